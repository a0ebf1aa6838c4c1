"""Instances of several ranks are profiled as `serve` runs them, and none of their processes outlives the command."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.engine.support import make_checkpoint

from distserve import machine
from distserve.cli import main
from distserve.costs.profile import Profile
from distserve.engine import hub
from distserve.engine.base import EngineOptions
from distserve.errors import PlanError
from distserve.profiler.messages import Chunks, Decodes, Prompts, Publish, Published, Pull, Took
from distserve.profiler.place import places
from distserve.profiler.workers import WorkerDied, Workers

SHORT = ["--time", "10", "--longest", "448", "--kv-memory", "8MiB", "--dtype", "float32"]
# So that pulls take their time:
LARGER: dict[str, Any] = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 8}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(folder, **LARGER)
    return folder


def engines(folder: Path, tp: int, pp: int) -> list[EngineOptions]:
    engine = EngineOptions(model=str(folder), dtype="float32", block_size=16, tp=tp, pp=pp)
    return places(engine, "cpu", "8MiB", hub.read_spec(folder)).engines


def descendants(*pids: int) -> list[psutil.Process]:
    return [child for pid in pids for child in psutil.Process(pid).children(recursive=True)]


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


async def test_groups_time_steps_pull_from_each_other_and_leave_nobody_behind(checkpoint: Path) -> None:
    async with Workers(engines(checkpoint, 2, 1)) as workers:
        processes = descendants(*(process.pid for process in workers._processes))
        assert len(processes) == 2 + 4  # workers and ranks
        source, target = workers.all
        for work in (Prompts([40, 7]), Decodes(4, 100, 3), Chunks([(32, 16)], 2, 50)):
            took = await source.ask(work, Took)
            assert all(0 < seconds < 30 for seconds in took.seconds)
        published = await source.ask(Publish(3), Published)
        await target.ask(Pull(published.handle), Took)  # raises where a byte is not what was promised
    assert_gone(processes)


async def test_a_rank_that_dies_is_told_and_nobody_is_left(checkpoint: Path) -> None:
    async with Workers(engines(checkpoint, 1, 2)[:1]) as workers:
        (process,) = workers._processes
        ranks = descendants(process.pid)
        assert len(ranks) == 2
        ranks[1].kill()
        with pytest.raises(WorkerDied, match="rank 1"):
            await workers.all[0].ask(Prompts([40]), Took)
    assert_gone(ranks)


async def test_groups_that_still_load_are_ended_with_all_their_ranks(checkpoint: Path) -> None:
    workers = Workers(engines(checkpoint, 2, 1))
    entering = asyncio.ensure_future(workers.__aenter__())
    processes: list[psutil.Process] = []
    while len(processes) < 2 + 4:
        await asyncio.sleep(0.005)
        processes = descendants(*(process.pid for process in workers._processes))
    entering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await entering
    assert_gone(processes)


def test_each_parallelism_is_measured_and_added_to_one_file(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "costs.json"
    model = str(checkpoint)
    assert main(["profile", model, "-o", str(out), "--tp", "2", "--no-live", *SHORT]) == 0
    first = json.loads(out.read_text())
    assert main(["profile", model, "-o", str(out), "--pp", "2", "--add", *SHORT]) == 0
    said = capsys.readouterr().err
    assert "added 1x2 to" in said
    assert "asking a live server" not in said
    second = json.loads(out.read_text())
    assert list(second["models"][model]) == ["2x1", "1x2"]
    assert second["models"][model]["2x1"] == first["models"][model]["2x1"]
    assert second["engine"] == first["engine"]
    assert "pull_bandwidth" in second["engine"]
    assert "1x2 measured on" in second["note"]
    costs = Profile.load(out).costs(model, spec=hub.read_spec(checkpoint))
    for tp, pp in ((2, 1), (1, 2)):
        latency = costs.latency(tp, pp)
        assert 0 < latency.coefficients.prompts(100, 100**2) < 10
        assert 0 < latency.coefficients.decodes(2, 100) < 10
    with pytest.raises(PlanError, match="do not know tp = 1, pp = 1"):
        costs.latency(1, 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": "bfloat16"}, "holds costs of the dtype bfloat16, these are of float32"),
        ({"machine": {"fingerprint": "a pocket calculator"}}, "holds costs of the machine a pocket calculator"),
        ({"engine": {"block_size": 16}}, "the block size 16"),
        ({"device": "h100"}, "the device h100"),
        ({"models": {}}, "models is empty"),
    ],
)
def test_nothing_is_added_to_costs_of_something_else(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], said: str
) -> None:
    table: dict[str, Any] = {
        "format": 1,
        "device": "cpu",
        "dtype": "float32",
        "date": "2026-11-22",
        "source": "a test",
        "machine": {"fingerprint": machine.fingerprint("cpu")},
        "models": {str(checkpoint): {"1": {"prefill": [[0.01, 1e-4, 0]], "decode": [[1, 0.01, 0, 1e-4]]}}},
    }
    out = tmp_path / "costs.json"
    out.write_text(json.dumps(table | change))
    before = out.read_text()
    assert main(["profile", str(checkpoint), "-o", str(out), "--tp", "2", "--add", *SHORT]) == 2
    assert said in capsys.readouterr().err
    assert out.read_text() == before


def test_degrees_that_do_not_fit_are_refused(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", str(checkpoint), "--tp", "3"]) == 2
    assert "take tp = 1 or 2 or 4 or 8" in capsys.readouterr().err
    assert main(["profile", str(checkpoint), "--add", "-o", "-"]) == 2
    assert "--add adds to a file" in capsys.readouterr().err


def test_ranks_are_placed_as_serve_places_them(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = hub.read_spec(checkpoint)
    engine = EngineOptions(model="some", tp=2)
    monkeypatch.setattr(machine, "cores", lambda: [0, 1, 2, 5])
    wide = places(engine, "cpu", None, spec)
    assert [found.ranks for found in wide.engines] == [((0,), (1,)), ((2,), (5,))]
    assert [found.cores for found in wide.engines] == [(0, 1), (2, 5)]
    assert wide.neighbours
    assert not wide.crowd
    assert wide.engines[0].kv_bytes == machine.DEFAULT_KV // 2  # of each rank
    monkeypatch.setattr(machine, "cores", lambda: [0, 1])
    assert not places(engine, "cpu", None, spec).neighbours
    crowded = places(EngineOptions(model="some", tp=2, pp=2), "cpu", "2MiB", spec)
    assert crowded.engines[0].ranks == ((0,), (1,), (0,), (1,))
    assert crowded.engines[0].kv_bytes == 2 << 20
    assert crowded.crowd == "4 ranks of an instance take turns on 2 cores"
    alone = places(EngineOptions(model="some"), "cpu", None, spec)
    assert [(found.cores, found.ranks) for found in alone.engines] == [((0,), ()), ((1,), ())]


def test_ctrl_c_ends_every_rank(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "costs.json"
    work = [sys.executable, "-m", "distserve", "profile", str(checkpoint), "-o", str(out), "--tp", "2", *SHORT]
    with subprocess.Popen(work, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "timing steps" in line:
                break
        processes = descendants(process.pid)  # one that loads, two workers, four ranks
        os.kill(process.pid, signal.SIGINT)
        process.stderr.read()
    assert process.returncode == 130
    assert len(processes) == 7
    assert_gone(processes)
