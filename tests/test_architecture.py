"""The house as a test: who may import whom, which library lives where, and how big a file may grow.

Every import counts, also one inside a function or under TYPE_CHECKING: what a file names it depends on.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "distserve"

ENTRIES = {"__init__", "__main__", "cli"}  # where users come in: they may import anything, and nobody imports them
NOUNS = {
    "errors",
    "gguf_head",
    "machine",
    "native",
    "ranks",
    "compiled",
    "precompile",
    "request",
    "specs",
    "sharding",
    "workload",
    "traces",
    "plan",
    "placement",
    "metrics",
    "catalogue",
    "cluster",
    "knee",
    "line",
    "flags",
    "interrupts",
    "outputs",
    "plots",
    "steady",
    "tables",
    "toml_file",
}

# room: (rooms and modules it may import beside itself and the nouns it may use, those nouns)
ROOMS: Final = {
    "sched": (set(), {"request", "errors"}),
    "costs": ({"sched.base"}, {"specs", "sharding", "errors", "catalogue", "cluster", "knee", "machine", "plan"}),
    "sim": ({"sched", "costs"}, NOUNS),
    "planner": ({"sim", "costs"}, NOUNS),
    "engine": ({"sched.base"}, NOUNS),
    "transfer": (set(), {"specs", "sharding", "errors", "native"}),
    "serve": ({"sched", "engine.base", "transfer.base", "transfer.layout"}, NOUNS),
    "control": ({"planner", "serve"}, {"metrics", "workload", "plan", "errors"}),
    "bench": (set(), NOUNS),
    "profiler": ({"engine.base", "transfer.base", "costs", "sched.base", "bench"}, NOUNS),
    "validate": ({"sim", "costs", "planner", "bench", "profiler.live"}, NOUNS),
}
# the modules that may name implementations of engine and transfer
LAUNCHERS = {"serve.launch", "profiler.worker"}

# library: modules (or rooms) that may import it
LIBRARIES = {
    "torch": {"engine", "transfer"},
    "transformers": {"engine.weights", "serve.http.tokens"},
    "pydantic": {"serve.http.openai"},
    "fastapi": {"serve"},
    "starlette": {"serve"},
    "uvicorn": {"serve"},
    "aiohttp": {"bench", "validate.live"},
    "aiconfigurator_core": {"costs.aiconfigurator"},
    "typer": {
        "cli",
        "flags",
        "serve.command",
        "bench.command",
        "planner.command",
        "sim.command",
        "profiler.command",
        "validate.command",
    },
}
PURE = {"sched", "costs", "sim"}  # decide, predict and imagine without a wall clock or an event loop
CLOCKS = {"asyncio", "time", "threading", "socket", "datetime"}

MAX_FILE = 400  # lines
MAX_FUNCTION = 80  # lines of a body; a command's signature is its table of options and may be longer


@dataclass(frozen=True)
class Module:
    """One file: `name` is its dotted path inside the package ("sched.base"; a package's own file is "sched")."""

    name: str
    path: Path
    inside: frozenset[str]  # modules of this package that it imports
    outside: frozenset[str]  # top-level names of everything else
    tree: ast.Module

    @property
    def room(self) -> str:
        return self.name.partition(".")[0]


def read_modules(root: Path) -> dict[str, Module]:
    paths = {dotted(path.relative_to(root)): path for path in sorted(root.rglob("*.py"))}
    modules = {}
    for name, path in paths.items():
        tree = ast.parse(path.read_text())
        inside, outside = set(), set()
        for imported in imports(tree, path):
            top, _, rest = imported.partition(".")
            if top == "distserve":
                inside.add(longest_module(rest, paths))
            else:
                outside.add(top)
        modules[name] = Module(name, path, frozenset(inside - {"", name}), frozenset(outside), tree)
    return modules


def dotted(path: Path) -> str:
    parts = list(path.with_suffix("").parts)
    if parts[-1] == "__init__" and len(parts) > 1:
        parts.pop()
    return ".".join(parts)


def imports(tree: ast.Module, path: Path) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, (
                f"{path}:{node.lineno}: a relative import; write `from distserve.<room>.<file> import`"
            )
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def longest_module(dotted_name: str, paths: dict[str, Path]) -> str:
    """The module behind "engine.base.Executor": "engine.base"."""
    while dotted_name and dotted_name not in paths:
        dotted_name = dotted_name.rpartition(".")[0]
    return dotted_name


def is_in(name: str, places: set[str]) -> bool:
    return any(name == place or name.startswith(place + ".") for place in places)


def misplaced(modules: dict[str, Module]) -> list[str]:
    """Files that belong to no room."""
    known = ENTRIES | NOUNS | set(ROOMS)
    return [
        f"{module.path}: there is no room or noun {module.room!r}. Put the file into one of {sorted(ROOMS)}, or add "
        f"the room to the design's table and to this test"
        for module in modules.values()
        if module.room not in known
    ]


def trespasses(modules: dict[str, Module]) -> list[str]:
    """Imports inside the package that the table does not allow."""
    found = []
    for module in modules.values():
        if module.room in ENTRIES or module.room not in NOUNS | set(ROOMS):
            continue
        rooms, nouns = ROOMS.get(module.room, (set(), NOUNS))
        allowed = rooms | nouns | ({module.room} if module.room in ROOMS else set())
        if module.name in LAUNCHERS:
            allowed = allowed | {"engine", "transfer"}
        for target in sorted(module.inside):
            if not is_in(target, allowed):
                launcher = "; only serve/launch.py names implementations" if module.room == "serve" else ""
                found.append(
                    f"{module.path} imports distserve.{target}, but {module.room} may import only {sorted(allowed)}. "
                    f"Move the code to the room that it belongs to, pass in the value that is needed, or put what "
                    f"both need into a noun{launcher}"
                )
    return found


def circles(modules: dict[str, Module]) -> list[str]:
    """Chains of imports that come back to where they began."""
    done: set[str] = set()
    found: list[str] = []

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            chain = " -> ".join([*path[path.index(name) :], name])
            found.append(f"a circle of imports: {chain}. Move what both need below both, or pass it as an argument")
        elif name not in done:
            for target in sorted(modules[name].inside):
                visit(target, [*path, name])
            done.add(name)

    for name in modules:
        visit(name, [])
    return found


def foreign(modules: dict[str, Module]) -> list[str]:
    """Libraries where they do not belong."""
    found = []
    for module in modules.values():
        if module.room in ENTRIES - {"cli"}:
            continue
        for library, places in LIBRARIES.items():
            if library in module.outside and not is_in(module.name, places):
                found.append(
                    f"{module.path} imports {library}, which belongs to {sorted(places)}: move the code there, or hand "
                    f"over plain values"
                )
        if module.room in PURE and (clocks := CLOCKS & module.outside):
            found.append(
                f"{module.path} imports {sorted(clocks)}: {module.room} knows no clock and no event loop; take `now` "
                f"as an argument and let the driver wait"
            )
        if module.room == "sched" and (extra := module.outside - sys.stdlib_module_names - {"__future__"}):
            found.append(
                f"{module.path} imports {sorted(extra)}: sched holds lists and integers, nothing but the standard "
                f"library"
            )
    return found


def oversized(modules: dict[str, Module]) -> list[str]:
    found = []
    for module in modules.values():
        lines = len(module.path.read_text().splitlines())
        if lines > MAX_FILE:
            found.append(f"{module.path} has {lines} lines, over {MAX_FILE}: look for the second noun hiding inside")
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
                length = (node.end_lineno or 0) - body[0].lineno + 1
                if length > MAX_FUNCTION:
                    found.append(
                        f"{module.path}:{node.lineno}: {node.name} has {length} lines, over {MAX_FUNCTION}: give its "
                        f"steps names"
                    )
    return found


@cache
def house() -> dict[str, Module]:
    return read_modules(PACKAGE)


CHECKS = [misplaced, trespasses, circles, foreign, oversized]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_house_is_in_order(check: object) -> None:
    assert callable(check)
    found = check(house())
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("name", ["cli", "serve.launch", "serve.gateway", "serve.http.api"])
def test_the_gateway_does_not_pay_for_torch(name: str) -> None:
    """Also not by way of a library: torch costs 200 MB and seconds in a process that never computes."""
    code = f"import sys, distserve.{name}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, (
        f"importing distserve.{name} imports torch. Import it where it is used, inside the instance's process: "
        f"`python -X importtime -c 'import distserve.{name}'` shows by which way it came\n{done.stderr}"
    )


# The test of the test: each rule finds the house in which it is broken.


def build(root: Path, files: dict[str, str]) -> dict[str, Module]:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return read_modules(root)


GOOD = {
    "__init__.py": "",
    "errors.py": "",
    "request.py": "from distserve.errors import RequestError\n",
    "sched/__init__.py": "",
    "sched/base.py": "from dataclasses import dataclass\n",
    "sched/prefill.py": "from distserve.sched.base import Batch\nfrom distserve.request import Request\n",
    "engine/__init__.py": "",
    "engine/base.py": "from distserve.sched import base\n",
    "engine/executor.py": "import torch\n",
    "transfer/__init__.py": "",
    "serve/__init__.py": "",
    "serve/gateway.py": "import asyncio\nfrom distserve.engine import base\nfrom distserve.sched.prefill import P\n",
    "serve/launch.py": "from distserve.engine.executor import E\nfrom distserve.serve import gateway\n",
}


def test_a_good_house_passes(tmp_path: Path) -> None:
    modules = build(tmp_path, GOOD)
    assert [check(modules) for check in CHECKS] == [[], [], [], [], []]
    assert modules["serve.launch"].inside == {"engine.executor", "serve.gateway"}
    assert modules["engine.base"].inside == {"sched.base"}


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("errors.py", "from distserve.sched.base import Batch\n", "errors may import only"),
        ("errors.py", "import distserve.request\n", "errors -> request -> errors"),
        ("sched/base.py", "import torch\n", "imports torch, which belongs to"),
        ("sched/base.py", "import numpy as np\n", "nothing but the standard library"),
        ("sched/base.py", "def f():\n    from time import monotonic\n", "knows no clock"),
        ("sched/base.py", "import asyncio.tasks\n", "knows no clock"),
        ("sched/base.py", "from distserve.engine.base import E\n", "sched may import only"),
        ("engine/base.py", "from distserve.sched.prefill import P\n", "engine may import only"),
        ("engine/base.py", "from distserve.serve import gateway\n", "engine may import only"),
        ("transfer/shm.py", "from distserve.engine.base import E\n", "transfer may import only"),
        ("serve/gateway.py", "from distserve.engine.executor import E\n", "only serve/launch.py names implementations"),
        ("serve/gateway.py", "import distserve.engine.executor\n", "only serve/launch.py names implementations"),
        ("serve/gateway.py", "import torch\n", "imports torch"),
        ("serve/gateway.py", "import transformers\n", "imports transformers"),
        ("serve/gateway.py", "import pydantic\n", "imports pydantic"),
        ("bench/run.py", "from distserve.serve.gateway import G\n", "bench may import only"),
        ("tools/run.py", "", "no room or noun 'tools'"),
        ("helpers.py", "", "no room or noun 'helpers'"),
        (
            "sched/base.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from distserve.sched.prefill import P\n",
            "sched.base -> sched.prefill -> sched.base",
        ),
        ("sched/base.py", "x = 1\n" * 401, "has 401 lines, over 400"),
        ("sched/base.py", "def f():\n    '''Doc.'''\n" + "    x = 1\n" * 81, "f has 81 lines, over 80"),
    ],
)
def test_a_broken_rule_is_found(tmp_path: Path, file: str, text: str, message: str) -> None:
    modules = build(tmp_path, GOOD | {file: text})
    found = [problem for check in CHECKS for problem in check(modules)]
    assert any(message in problem for problem in found), found


def test_relative_imports_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="a relative import"):
        build(tmp_path, GOOD | {"sched/base.py": "from . import prefill\n"})
