"""The compiled modules are the same program: what they compute equals what the interpreter computes, bit by bit."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.scripts import script
from tests.test_architecture import house

from distserve import compiled, precompile
from distserve.native import BuildError

# Every kind of instance, alone and several, with room and without, with stages, by measured and by derived costs.
SCRIPT = """
import json, pickle, sys
from distserve import compiled
from distserve.costs.choose import choose_costs
from distserve.plan import InstanceSpec, Plan, Policy, Role
from distserve.sim.simulate import imagine
from distserve.workload import Workload

def instances(text):
    for part in text.split(" + "):
        role, tp, pp, count, *policy = part.split()
        yield InstanceSpec(Role(role), int(tp), int(pp), int(count), policy=Policy(policy[0]) if policy else None)

found = []
for model, device, costs, rate, text in json.loads(sys.argv[1]):
    chosen = pickle.loads(pickle.dumps(choose_costs(model, device, costs)))  # as other processes get them
    workload = Workload.load("sharegpt").draw(rate, 250, seed=3).clipped(chosen.spec.max_model_len)
    batches = []
    trace = lambda name, start, items: batches.append((name, start.hex(), items))
    run = imagine(Plan(tuple(instances(text))), workload, chosen, trace=trace)
    times = ("started", "first", "pull_started", "pulled", "last")
    lives = [[float(getattr(life, name)).hex() for name in times] for life in run.lives]
    usage = [(name, use.busy.hex(), use.steps, use.batch, use.context) for name, use in run.usage.items()]
    found.append([run.end.hex(), lives, usage, sorted(batches)])
print(json.dumps([compiled.in_use(), found]))
"""
CASES = [
    ("facebook/opt-13b", "a100-80g", None, 4.5, "prefill 2 1 1 + decode 1 1 1"),
    ("facebook/opt-13b", "h100-80g", None, 30.0, "prefill 2 1 2 + decode 1 1 3"),
    ("facebook/opt-66b", "a100-80g", None, 4.0, "prefill 4 1 1 + decode 2 2 1"),
    ("Qwen/Qwen3-32B", "h100-80g", None, 6.0, "prefill 4 2 1 + decode 4 2 1 + colocated 4 1 1 chunked"),
    ("facebook/opt-13b", "a100-80g", "a100-80g-vllm", 3.0, "colocated 1 1 2 prefill-first"),
    ("Qwen/Qwen3-32B", "h100-80g", None, 9.0, "colocated 2 2 1 chunked + colocated 2 1 1 chunked"),
]


def imagined(interpreted: bool) -> list[object]:
    """[whether the compiled modules ran, what came of it]"""
    found: list[object] = json.loads(script(SCRIPT, json.dumps(CASES), interpreted=interpreted))
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_compiled_and_interpreted_results_are_equal() -> None:
    try:
        precompile.build()
    except BuildError as error:
        pytest.skip(str(error))
    (compiled_ran, ours), (interpreter_ran, theirs) = imagined(interpreted=False), imagined(interpreted=True)
    assert compiled_ran
    assert not interpreter_ran
    assert ours == theirs


def test_all_sources_that_shape_the_code_are_in_its_hash() -> None:
    """A type that changes beneath compiled code would be another program."""
    modules = house()
    seen: set[str] = set()
    waiting = list(compiled.MODULES)
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += sorted(modules[name].inside)
    rooms = {name for name in seen if modules[name].path.name == "__init__.py"}
    assert seen - rooms == {*compiled.MODULES, *compiled.TYPES}


def test_all_that_shapes_the_code_beside_sources_is_in_its_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/nowhere")
    folder = compiled.folder.__wrapped__
    ours = folder()
    assert folder() == ours
    for name, other in (
        ("FLAGS", ("-O0", *compiled.FLAGS[1:])),
        ("MODULES", compiled.MODULES[1:]),
        ("TYPES", compiled.TYPES[1:]),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(compiled, name, other)
            assert folder() != ours, name
    monkeypatch.setattr(platform, "machine", lambda: "another")
    assert folder() != ours


def test_what_is_in_the_hash_is_what_the_compiler_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\necho "$@" >> told\n')
    compiler.chmod(0o755)
    (tmp_path / "a.c").touch()
    monkeypatch.setattr(compiled, "FLAGS", ("-O2", "-another"))
    precompile._compile(str(compiler), tmp_path, [SimpleNamespace(name="a", sources=["a.c"])], tmp_path)
    compiling, linking = (tmp_path / "told").read_text().splitlines()
    assert compiling.startswith("-O2 -another -I")
    assert linking.startswith("-shared a.c.o")


def test_what_nobody_used_lately_is_cleared_away_when_something_new_is_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache, hour = tmp_path / "compiled", 3600
    ages = {"a": 1000, "b": 25, "c": 23, "d": 0, "tmp-of-a-killed-build": 30, "e": 500, "f": 24.5}  # hours
    for name, age in ages.items():
        (cache / name).mkdir(parents=True)
        (cache / name / "code.so").touch()
        os.utime(cache / name, (0, time.time() - age * hour))
    monkeypatch.setattr(compiled, "folder", lambda: cache / "new")
    monkeypatch.setattr(precompile, "find_compiler", lambda: "cc")
    monkeypatch.setattr(precompile, "_translate", lambda work: [])
    monkeypatch.setattr(precompile, "_compile", lambda compiler, work, extensions, made: (made / "new.so").touch())
    assert precompile.build() == cache / "new"
    assert sorted(path.name for path in cache.iterdir()) == ["c", "d", "f", "new"]
    assert (cache / "new" / "new.so").exists()
    assert (cache / "c" / "code.so").exists()
    os.utime(cache / "f", (0, 0))
    assert precompile.build() == cache / "new"
    assert (cache / "f").exists(), "nothing new, nothing cleared"


def test_code_that_a_process_takes_counts_as_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / compiled.file_of(compiled.LIBRARY)).touch()
    os.utime(tmp_path, (0, 0))
    monkeypatch.delenv(compiled.OFF, raising=False)
    monkeypatch.setattr(compiled, "folder", lambda: tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    compiled.install()
    assert compiled.in_use()
    assert tmp_path.stat().st_mtime > time.time() - 60


def test_who_waits_for_the_interpreter_is_told_how_not_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(compiled.OFF, "1")
    assert compiled.notice() is None, "who asked for it is told nothing"
    monkeypatch.delenv(compiled.OFF)
    assert compiled.in_use() or "distserve.precompile" in (compiled.notice() or "")
