"""`python -m distserve.engine.kernels`: builds the kernels ahead of their first use and says what they can."""

from __future__ import annotations

import logging
import sys

from distserve import machine
from distserve.engine.kernels.bindings import load

_MULTIPLIES = {
    "tiles": "AMX tiles",
    "vectors": "AVX512-BF16 vectors",
    None: "generic C, matrix products by torch",
}


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    kernels = load()
    if kernels is None:
        print(f"CPU kernels: none ({machine.KERNELS_DIAL} is {machine.kernels()}); plain torch computes")
        return 0 if machine.kernels() == "off" else 1
    print(f"CPU kernels: ready ({_MULTIPLIES[kernels.unit]}; {'OpenMP' if kernels.has_threads else 'one thread'})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
