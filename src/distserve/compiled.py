"""Which modules run as machine code, and where it lies. Knows nothing of what they compute, and not how it is made
(`precompile.py`).

Scheduling, costs and the simulator are plain Python. The same files, compiled by mypyc, run many times as fast; their
results are equal to the last bit. What was compiled from exactly these sources for this interpreter is found in the
cache when the package is imported, and takes the place of the files; where nothing is found they run as they are.

DISTSERVE_INTERPRETED=1 in the environment leaves them out: for a debugger, for coverage, for a test that replaces a
method.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import sys
import sysconfig
from collections.abc import Sequence
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Final

PACKAGE: Final = "distserve"
LIBRARY: Final = f"{PACKAGE}__mypyc"  # holds the code of all of them; mypyc gives it this name
OFF: Final = "DISTSERVE_INTERPRETED"

MODULES: Final = (
    "costs.latency",
    "sched.base",
    "sched.blocks",
    "sched.colocated",
    "sched.continuous",
    "sched.decode",
    "sched.lockstep",
    "sched.order",
    "sched.prefill",
    "sched.roles",
    "sched.router",
    "sched.turns",
    "sim.events",
    "sim.flight",
    "sim.instance",
    "sim.life",
    "sim.pulls",
    "sim.swap",
    "sim.usage",
    "sim.weather",
    "sim.world",
)
# What they import and what stays interpreted: its types are compiled in.
TYPES: Final = (
    "cluster",
    "costs.base",
    "costs.memory",
    "costs.network",
    "costs.seats",
    "errors",
    "knee",
    "machine",
    "metrics",
    "plan",
    "sched.policy",  # its Literal types are read by the decoder of an instance's configuration
    "sharding",
    "specs",
    "toml_file",
    "traces",
)

FLAGS: Final = ("-O2", "-flto", "-fPIC", "-fwrapv", "-fvisibility=hidden", "-DNDEBUG", "-w")  # of the C compiler


def source(module: str) -> Path:
    """The file of one of the names above."""
    return Path(__file__).parent.joinpath(*module.split(".")).with_suffix(".py")


@cache
def folder() -> Path:
    """Where the code compiled from these sources, with these flags, for this interpreter lies, or would lie."""
    digest = hashlib.sha256(repr((sysconfig.get_config_var("SOABI"), platform.machine(), MODULES, FLAGS)).encode())
    for module in (*MODULES, *TYPES):
        digest.update(source(module).read_bytes())
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / PACKAGE / "compiled" / digest.hexdigest()[:24]


def file_of(name: str) -> str:
    """Of a module, in `folder()`."""
    return f"{name}.so"


class _Finder(MetaPathFinder):
    """Finds the compiled modules before Python finds their sources."""

    def __init__(self, where: Path) -> None:
        names = (LIBRARY, *(f"{PACKAGE}.{module}" for module in MODULES))
        self._files = {name: str(where / file_of(name)) for name in names}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        file = self._files.get(fullname)
        return None if file is None else spec_from_file_location(fullname, file)


def install() -> None:
    """From now on the compiled modules are imported, where there are any. Called once, before any of them is."""
    if not os.environ.get(OFF) and folder().joinpath(file_of(LIBRARY)).exists():
        sys.meta_path.insert(0, _Finder(folder()))
        with contextlib.suppress(OSError):  # of a cache that others share and this user may not write
            os.utime(folder())  # who tidies up sees by it what is in use


def in_use() -> bool:
    """Whether this process runs them."""
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


def notice() -> str | None:
    """What to tell somebody who waits for the interpreter without having asked for it; None: nothing."""
    if in_use() or os.environ.get(OFF):
        return None
    return f"the simulator is interpreted, some ten times slower: `{Path(sys.executable).name} -m {PACKAGE}.precompile`"
