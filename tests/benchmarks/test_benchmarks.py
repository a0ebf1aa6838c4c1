"""The benchmarks' own parts: workers that take turns, the exported checkpoint, tables, and the limits' arithmetic."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path

import pytest
from benchmarks.harness import ROOT, Worker, table

from benchmarks import engine, load
from distserve.engine import hub

CORE = min(os.sched_getaffinity(0))


def test_a_worker_answers_whatever_its_libraries_print_and_tells_its_errors() -> None:
    with Worker("tests.benchmarks.echo_worker", core=CORE) as worker:
        assert worker.seconds("double", value=1.5) == 3.0
        with pytest.raises(RuntimeError, match="ValueError: on purpose"):
            worker.ask("fail")
        assert worker.seconds("double", value=2.0) == 4.0, "an error does not end it"


def test_a_worker_that_cannot_start_shows_the_end_of_its_log() -> None:
    with pytest.raises(RuntimeError, match="No module named"):
        Worker("tests.benchmarks.no_such_module", core=CORE)


def test_a_table_is_aligned_markdown() -> None:
    lines = table(["what", "s"], [["a", 1], ["longer", 10.5]]).splitlines()
    assert lines == ["| what   |    s |", "|--------|-----:|", "| a      |    1 |", "| longer | 10.5 |"]


def test_poisson_moments_have_the_rate_and_repeat() -> None:
    moments = load.poisson(50, 5000)
    assert moments == load.poisson(50, 5000)
    assert moments == sorted(moments)
    assert 5000 / moments[-1] == pytest.approx(50, rel=0.05)


def test_the_limits_count_what_a_step_must_do() -> None:
    spec = hub.read_spec(hub.resolve("demo"))
    assert engine.decode_bytes(spec, 1, 0) == pytest.approx(269e6, rel=0.01)
    per_token = engine.decode_bytes(spec, 1, 1) - engine.decode_bytes(spec, 1, 0)
    assert per_token == 30 * 2 * 3 * 64 * 2, "30 layers of keys and values, 3 heads of 64 bf16 numbers each"
    linear = 2 * 106_168_320 * 512  # two operations per weight of the layers' matrices, and token
    assert engine.prefill_operations(spec, 512) == pytest.approx(linear * 1.08, rel=0.02)


@pytest.mark.parametrize("module", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_every_benchmark_says_how_to_run_it_and_how_it_measures(module: Path) -> None:
    docstring = ast.get_docstring(ast.parse(module.read_text()))
    assert docstring, f"{module.name} has no docstring"
    tree = module.read_text()
    if "ArgumentParser" in tree and "serve_commands" not in tree:
        assert f"benchmarks.{module.stem}" in docstring or f"benchmarks/{module.name}" in docstring


def test_what_runs_under_a_peers_interpreter_needs_nothing_of_ours() -> None:
    """The vLLM contender and the harness import the standard library, their peer and each other only."""
    allowed = sys.stdlib_module_names | {"benchmarks.harness", "vllm", "torch"}
    for name in ("harness", "engine_vllm"):
        for node in ast.walk(ast.parse((ROOT / "benchmarks" / f"{name}.py").read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {part if part in allowed else part.partition(".")[0] for part in names} <= allowed, (
                f"{name}: {names}"
            )
