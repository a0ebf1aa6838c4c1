"""Compiles small C libraries with the machine's own compiler, once: the result is cached by a hash of everything that
shapes it. Knows nothing of what the libraries compute.

Several processes may build at once: each compiles to a name of its own and renames it into place.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

log = logging.getLogger(__name__)

_COMMON = ("-O3", "-std=gnu11", "-shared", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math")
# tried in order: what a compiler does not know costs speed, not the library
FLAGS = (("-march=native",), ("-mcpu=native",), ())
THREADED = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), *FLAGS)

Flags = Sequence[tuple[str, ...]]


class BuildError(Exception):
    """A library cannot be compiled here; the message says why and what to do."""


def build(folder: Path, sources: Sequence[str], flags: Flags = FLAGS) -> Path:
    """The library of the first of `sources`, which includes the others, all in `folder`: from the cache, or made now
    (some seconds). Raises `BuildError`."""
    compiler = find_compiler()
    target = _cache() / f"{_digest(folder, sources, flags, compiler)}.so"
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as made_in:
            made = Path(made_in) / "library.so"
            _compile(compiler, folder / sources[0], flags, made)
            os.replace(made, target)
    except OSError as error:
        raise BuildError(f"cannot write the kernel cache {target.parent}: {error}; set XDG_CACHE_HOME") from error
    return target


def find_compiler() -> str:
    """$CC, or the first of cc, gcc, clang. Raises `BuildError`."""
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        path = shutil.which(name) if name else None
        if path is not None:
            return path
    raise BuildError("no C compiler found; install gcc or clang (for example: apt install gcc)")


def _compile(compiler: str, source: Path, choices: Flags, target: Path) -> None:
    errors = ""
    for flags in choices:
        command = [compiler, *_COMMON, *flags, str(source), "-o", str(target), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            log.info("compiled %s: %s", source.name, " ".join(command))
            return
        errors = errors or done.stderr.strip()
    first = errors.splitlines()[0] if errors else "no message"
    raise BuildError(f"{compiler} cannot compile {source.name}: {first}")


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "distserve" / "kernels"


def _digest(folder: Path, sources: Sequence[str], flags: Flags, compiler: str) -> str:
    """Of the sources, the flags, the compiler and the processor: a home folder may be shared by unlike machines."""
    digest = hashlib.sha256()
    for name in sources:
        digest.update(folder.joinpath(name).read_bytes())
    status = os.stat(compiler)
    digest.update(repr((_COMMON, flags, os.path.realpath(compiler), status.st_size, status.st_mtime_ns)).encode())
    digest.update(repr((platform.system(), platform.machine(), _processor())).encode())
    return digest.hexdigest()[:24]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
