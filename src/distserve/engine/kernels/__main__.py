"""`python -m distserve.engine.kernels`: builds the kernels ahead of their first use and says what they can."""

from __future__ import annotations

import logging
import sys

from distserve.engine.kernels.bindings import load, mode


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    kernels = load()
    if kernels is None:
        print(f"CPU kernels: none (mode {mode()}); plain torch computes")
        return 0 if mode() == "off" else 1
    tiles = "AMX tiles" if kernels.tiles else "generic C, matrix products by torch"
    print(f"CPU kernels: ready ({tiles}; {'OpenMP' if kernels.has_threads else 'one thread'})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
