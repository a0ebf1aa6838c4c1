"""Compiles the modules that `compiled.py` names, once. Knows nothing of what they compute.

    python -m distserve.precompile

Needs mypy (the extra `fast`) and a C compiler, and half a minute; the result lies in the user's cache, by a hash of the
sources, the interpreter and the C compiler's flags. Several processes may do so at once: each works in a folder of its
own and renames it. Whoever makes something new clears away what nobody used lately.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from distserve import compiled
from distserve.native import BuildError, find_compiler

_KEPT = 4  # folders in the cache: of other interpreters, and of sources that somebody goes back to
_LATELY = 24 * 3600.0  # seconds; what was used since then may be in use


def build() -> Path:
    """The folder of the compiled modules: from the cache, or made now. Raises `BuildError`."""
    target = compiled.folder()
    if target.exists():
        return target
    compiler = find_compiler()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as made_in:
            work, made = Path(made_in), Path(made_in) / "made"
            made.mkdir()
            _compile(compiler, work, _translate(work), made)
            with contextlib.suppress(FileExistsError, NotADirectoryError):
                made.rename(target)
            _clear(target.parent, work)
    except OSError as error:
        if not target.exists():
            raise BuildError(f"cannot write the cache {target.parent}: {error}; set XDG_CACHE_HOME") from error
    return target


def _clear(cache: Path, trash: Path) -> None:
    """Moves what nobody used lately out of `cache`, but for the newest few, into `trash`, which its owner deletes: by a
    rename, so that a process which begins meanwhile finds all of a folder or nothing."""
    used = {folder: _used(folder) for folder in cache.iterdir() if folder != trash}
    newest_first = sorted(used, key=lambda folder: used[folder], reverse=True)
    for folder in newest_first[_KEPT:]:
        if used[folder] < time.time() - _LATELY:
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                folder.rename(trash / f"old-{folder.name}")


def _used(folder: Path) -> float:
    """When a process last took its code from there (`compiled.install`); now, where another one cleared it away."""
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return time.time()


def _translate(work: Path) -> list[Any]:
    """Python to C, in a copy of the sources in `work`: mypyc's list of extensions, as setuptools describes such."""
    try:
        from mypyc.build import mypycify
    except ImportError as error:
        raise BuildError(f"mypyc is missing ({error}): pip install 'distserve[fast]', or mypy alone") from error
    package = Path(__file__).parent
    for file in package.rglob("*.py"):
        copy = work / compiled.PACKAGE / file.relative_to(package)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    paths = [str(Path(compiled.PACKAGE).joinpath(*module.split(".")).with_suffix(".py")) for module in compiled.MODULES]
    options = [
        "--config-file=",
        "--ignore-missing-imports",
        "--follow-imports=silent",
        f"--python-executable={sys.executable}",
    ]
    said = io.StringIO()
    try:
        with contextlib.chdir(work), contextlib.redirect_stdout(said):
            extensions = mypycify([*options, *paths], group_name=compiled.PACKAGE, target_dir="c", multi_file=True)
    except (Exception, SystemExit) as error:
        raise BuildError(f"mypyc cannot compile these sources: {said.getvalue() or error}") from error
    return list(extensions)


def _compile(compiler: str, work: Path, extensions: list[Any], made: Path) -> None:
    include = f"-I{sysconfig.get_path('include')}"
    import mypyc

    runtime = f"-I{Path(mypyc.__file__).parent / 'lib-rt'}"

    def run(*arguments: str) -> None:
        done = subprocess.run([compiler, *arguments], cwd=work, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(f"{compiler} {' '.join(arguments)} failed: {done.stderr.strip().splitlines()[:1]}")

    def compile_one(source: str) -> None:
        run(*compiled.FLAGS, include, runtime, "-Ic", "-c", source, "-o", f"{source}.o")

    sources = sorted({source for each in extensions for source in each.sources}, key=_size(work))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources))
        for each in extensions:
            objects = [f"{source}.o" for source in each.sources]
            pool.submit(run, "-shared", *objects, "-o", str(made / compiled.file_of(each.name))).result()


def _size(work: Path) -> Any:
    """Largest first: the last one to end is then a small one."""
    return lambda source: -work.joinpath(source).stat().st_size


def main() -> int:
    began = time.monotonic()
    try:
        where = build()
    except BuildError as error:
        print(f"distserve: {error}", file=sys.stderr)
        return 1
    print(f"the simulator, compiled: {where} ({time.monotonic() - began:.0f} s)", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
