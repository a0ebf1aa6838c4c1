"""How the experiment goes through its cells, with servers in vLLM's place that compute nothing, as real processes."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import psutil
import pytest
from benchmarks.servers import Server, free_port
from experiments.live_goodput import figures, measuring, page, peers, results
from experiments.live_goodput.cases import CASES, SCALES
from experiments.live_goodput.contenders import APART, CHUNKED, OURS, VLLM, VLLM_APART, WHOLE, label
from experiments.live_goodput.measuring import Asked, Measuring, from_the_middle, in_turn, measure
from experiments.live_goodput.neighbours import BEGAN, by_rate, pairs, summary
from experiments.live_goodput.results import Choice, Row
from experiments.live_goodput.servers import Servers
from tests.validate.support import MODEL, load_costs, write_costs

from benchmarks import servers as processes
from distserve.costs.base import Costs
from distserve.metrics import Record
from distserve.validate import grid, others
from distserve.validate.record import Chosen, Key, Measured, Recording
from distserve.validate.steps import Step

FAKE = Path(__file__).parent / "fake_vllm.py"
CHAT, CODE, _ = CASES
Modes = Callable[..., Path]


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Modes:
    """vLLM's two servers are fakes from here on, of these modes; returns their diary."""
    diary = tmp_path / "diary.jsonl"

    def use(first: str = "", second: str = "") -> Path:
        modes = [first, second]

        def vllm(python: str, folder: Path, *, cores: str, **_: object) -> Server:
            port = free_port()
            return Server("vllm", [sys.executable, str(FAKE), str(port), str(diary), modes[int(cores)]], port)

        monkeypatch.setattr(processes, "vllm", vllm)
        return diary

    monkeypatch.setattr(processes, "OUT", tmp_path)
    monkeypatch.setattr(peers, "demo_folder", lambda: tmp_path)
    monkeypatch.setattr(peers, "_has_nixl", lambda python: True)
    return use


@pytest.fixture
def recording(tmp_path: Path) -> Recording:
    found = Recording(tmp_path / "runs.jsonl", MODEL, "somewhere", "some version")
    for case in (CHAT, CODE):
        found.add_chosen("all", case.workload, Chosen((4.0, 8.0), (case.slo,)))
    return found


@pytest.fixture
def costs(tmp_path: Path) -> Costs:
    return load_costs(write_costs(tmp_path / "costs.json"))


def asked(*names: str, cases: Sequence[Any] = (CHAT, CODE)) -> Asked:
    return Asked(cases, names, duration=1.0, vllm_python=sys.executable)


def lines(diary: Path, kind: str) -> list[Any]:
    return [line for text in diary.read_text().splitlines() if kind in (line := json.loads(text))]


def gone(diary: Path) -> bool:
    return not any(psutil.pid_exists(line["pid"]) for line in lines(diary, "pid"))


def all_stopped(diary: Path) -> int:
    """How many there are; returns as soon as they are."""
    pids = [line["pid"] for line in lines(diary, "pid")]
    for pid in pids:
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
    return len(pids)


def test_replicas_start_once_for_all_cases(
    fakes: Modes, recording: Recording, costs: Costs, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    diary = fakes()
    found = measure(asked(VLLM), costs, recording)
    assert (found.failures, found.interrupted, found.left) == ([], False, [])
    assert {(key.workload, key.rate) for key in recording.runs} == {
        (case.workload, rate) for case in (CHAT, CODE) for rate in (4.0, 8.0)
    }
    assert len(lines(diary, "pid")) == 2
    assert gone(diary)
    by_port: dict[int, int] = {}
    for line in lines(diary, "request"):
        by_port[line["port"]] = by_port.get(line["port"], 0) + 1
        assert set(line["request"]["prompt"]) <= set(range(100, 164)), "of this server's own tokens"
    few, many = sorted(by_port.values())
    assert many - few <= 1
    for run in recording.runs.values():
        assert all(record.ok for record in run.records)
        offered = CHAT.lengths if run.key.workload == CHAT.workload else CODE.lengths
        drawn = offered.workload.draw(run.key.rate, len(run.records)).arrivals
        assert [r.prompt_tokens for r in run.records] == [arrival.prompt_tokens for arrival in drawn]
    said = capsys.readouterr().err
    assert "4 of 4, 0 min left" in said
    assert str(tmp_path / "server-vllm-1.log") in said


def test_prefill_and_decode_apart_hand_over(fakes: Modes, recording: Recording, costs: Costs) -> None:
    diary = fakes()
    assert measure(asked(VLLM_APART, cases=[CHAT]), costs, recording).failures == []
    prefill, decode = (line["port"] for line in lines(diary, "pid"))
    sent = lines(diary, "request")
    prompts = [line["request"] for line in sent if "do_remote_decode" in line["request"]["kv_transfer_params"]]
    answers = [line["request"] for line in sent if "remote_port" in line["request"]["kv_transfer_params"]]
    assert len(prompts) == len(answers) == len(sent) / 2
    assert {line["port"] for line in sent if line["request"] in prompts} <= {prefill, decode}
    assert all(body["max_tokens"] == 1 and not body["stream"] for body in prompts)
    assert len({body["kv_transfer_params"]["remote_port"] for body in answers}) == 1
    assert sorted(map(str, (body["prompt"] for body in prompts))) == sorted(map(str, (b["prompt"] for b in answers)))
    for run in recording.runs.values():
        assert all(record.ok for record in run.records)
        assert run.client["late_p99"] < 1.0


def test_one_that_does_not_start_takes_the_other_with_it(
    fakes: Modes, recording: Recording, costs: Costs, tmp_path: Path
) -> None:
    diary = fakes("", "refuses")
    (failure,) = measure(asked(VLLM), costs, recording).failures
    assert "vllm-1 ended with status 1" in failure
    assert "no such accelerator" in (tmp_path / "server-vllm-1.log").read_text()
    assert gone(diary)
    assert not recording.runs


def test_one_that_dies_spoils_the_cell(fakes: Modes, recording: Recording, costs: Costs) -> None:
    diary = fakes("", "dies")
    (failure,) = measure(asked(VLLM), costs, recording).failures
    assert "server-vllm-1.log" in failure
    assert gone(diary)
    assert not recording.runs


def test_a_contender_that_is_not_installed_is_said(
    fakes: Modes, recording: Recording, costs: Costs, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes()
    monkeypatch.setattr(peers, "_has_nixl", lambda python: False)
    (failure,) = measure(asked(VLLM_APART), costs, recording).failures
    assert "nixl" in failure


def test_ctrl_c_keeps_whole_cells_and_ends_the_servers(
    fakes: Modes, recording: Recording, costs: Costs, monkeypatch: pytest.MonkeyPatch
) -> None:
    diary = fakes()
    first = threading.Event()
    add = recording.add

    def kept(run: Measured) -> Measured:
        first.set()
        return add(run)

    monkeypatch.setattr(recording, "add", kept)

    def press() -> None:
        if first.wait(60):
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    found = measure(asked(VLLM), costs, recording)
    thread.join()
    assert found.interrupted
    assert 1 <= len(recording.runs) < 4
    assert gone(diary)


def test_contenders_take_turns_at_each_rate(
    recording: Recording, costs: Costs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.live_goodput.contenders.capacity", lambda case, plan, costs: 1.0)
    names = (*OURS, VLLM, VLLM_APART)
    cells, who = measuring.grid(asked(*names), costs, recording)
    rounds = [cells[i : i + 5] for i in range(0, len(cells), 5)]
    assert [{(key.workload, key.rate) for key in each} for each in rounds] == [
        {(case.workload, rate)} for case in (CHAT, CODE) for rate in (4.0, 8.0)
    ]
    assert all(sorted(key.plan for key in each) == sorted(names) for each in rounds)
    assert len({each[0].plan for each in rounds}) > 1
    assert set(who) == {(key.plan, key.workload) for key in cells}
    assert from_the_middle((1, 2, 3, 4, 5)) == [3, 2, 4, 1, 5]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_everyone_stands_as_often_behind_every_other(count: int) -> None:
    names = [str(i) for i in range(count)]
    rounds = count if count % 2 == 0 else 2 * count
    orders = [in_turn(names, number) for number in range(rounds)]
    assert all(sorted(order) == names for order in orders)
    for place in range(count):
        assert {[order[place] for order in orders].count(name) for name in names} == {rounds // count}
    behind = [pair for order in orders for pair in pairwise(order)]
    assert {behind.count(pair) for pair in permutations(names, 2)} <= {rounds // count}


def test_one_directly_behind_the_other_and_stopped_between(
    fakes: Modes, recording: Recording, costs: Costs, monkeypatch: pytest.MonkeyPatch
) -> None:
    diary = fakes()
    stopped: list[int] = []
    cell = measuring._cell

    async def watched(found: Measuring, servers: Servers, key: Key) -> None:
        stopped.append(all_stopped(diary))
        await cell(found, servers, key)

    monkeypatch.setattr(measuring, "_cell", watched)
    monkeypatch.setattr(others, "look", lambda session: None)  # what else runs here spoils nothing
    assert measure(asked(VLLM, VLLM_APART, cases=[CHAT]), costs, recording).failures == []
    assert stopped == [4] * 4  # all are up before the first cell, and none is at work between two
    assert gone(diary)
    began = [(run.client[BEGAN], key.rate, key.plan) for key, run in recording.runs.items()]
    assert [(rate, name) for _, rate, name in sorted(began)] == [
        (4.0, VLLM), (4.0, VLLM_APART), (8.0, VLLM_APART), (8.0, VLLM)
    ]  # fmt: skip
    found = pairs(CHAT, recording, costs)
    assert [(pair.first.key.rate, pair.names) for pair in found] == [
        (4.0, (VLLM, VLLM_APART)), (8.0, (VLLM_APART, VLLM))
    ]  # fmt: skip
    assert by_rate(found).count("- / -") == 2
    assert f"| {VLLM} | {VLLM_APART} | 2 |" in summary(found)


def test_who_dies_is_left_and_the_others_go_on(fakes: Modes, recording: Recording, costs: Costs) -> None:
    diary = fakes("", "dies")  # in its third request: the one that is asked first, of two that are the same
    found = measure(asked(VLLM, VLLM_APART, cases=[CHAT]), costs, recording)
    assert len(found.failures) == len(found.lost) == 2
    assert not found.left
    assert gone(diary)


def test_runs_that_did_not_keep_when_they_began_are_nobodys_neighbours(recording: Recording, costs: Costs) -> None:
    for each in (row(VLLM, 1.0), row(VLLM_APART, 0.5)):
        recording.add(each.runs[0])
    assert pairs(CHAT, recording, costs) == []
    for name, began in ((VLLM, 100.0), (VLLM_APART, 114.0)):
        run = recording.runs[Key(name, CHAT.workload, 1.0, 0, 0)]
        recording.add(replace(run, client={BEGAN: began}))
    (pair,) = pairs(CHAT, recording, costs)
    assert pair.gain(VLLM, CHAT.slo) == 0.5
    assert pair.gain(VLLM_APART, CHAT.slo) == -0.5
    run = recording.runs[pair.second.key]
    recording.add(replace(run, client={BEGAN: 1e4}))  # much later
    assert pairs(CHAT, recording, costs) == []


def test_neighbours_are_compared_with_how_far_their_weather_was_apart(
    recording: Recording, costs: Costs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "choice", lambda case, costs, scale: Choice(WHOLE, 1.0))
    assert "directly behind" not in page.text(recording, costs, "runs.jsonl")
    coefficients = costs.latency(1, 1).coefficients
    for name, share, began, times in ((APART, 1.0, 100.0, 1.5), (WHOLE, 0.5, 114.0, 2.0)):
        served = grid.pinned(grid.PLANS["1p1d" if name == APART else "2c-whole"], costs, MODEL, "cpu")
        recording.add_plan(label(name, CHAT), served, served)
        (run,) = row(name, share).runs
        slow = Step(0.0, times * coefficients.prompts(64, 4096), 64, 4096, 0, 0)
        steps = {replica.name: (slow,) for replica in served.replicas()}
        recording.add(replace(run, client={BEGAN: began}, steps=steps))
    said = page.text(recording, costs, "runs.jsonl")
    assert f"| {APART} | {WHOLE} | 1 | +50.0 | +50.0 | 0.50 |" in said
    assert f"| 1/s | {APART} | {WHOLE} | 100.0 | 50.0 | -50.0 | 1.50 / 2.00 |" in said


# -- what is said of it ------------------------------------------------------------------------------------------------


def row(name: str, *shares: float, tpot: float = 1e-3) -> Row:
    """At 1, 2, 3 .. requests/s these shares of 100 requests meet chat's targets; the others meet none."""
    runs = []
    for rate, share in enumerate(shares, 1):
        records = [Record(i * 0.1, 10, 10, 1e-3 if i < 100 * share else 1e3, tpot) for i in range(100)]
        runs.append(Measured(Key(name, CHAT.workload, float(rate), 0, 0), 0.0, 10.0, tuple(records)))
    return Row(CHAT, name, tuple(runs))


def test_the_second_best_is_named_with_how_far_it_is_behind() -> None:
    found = [row(APART, 1.0, 0.8), row(WHOLE, 1.0, 0.9, 0.8), row(CHUNKED, 0.5, 0.4)]
    assert [each.contender for each in results.ranked(found, CHAT.slo)] == [WHOLE, APART]
    for mine, expected, sure in ((found[0], 0.25, True), (found[2], 0.5, False)):
        share, exact = results.behind(mine, found[1], CHAT.slo)
        assert share == pytest.approx(expected)
        assert exact is sure
    said = page._best(found, CHAT.slo)
    assert said == f"The highest goodput: {WHOLE} (2.00 requests/s), then {APART} (1.50, 25% less)."


@pytest.mark.parametrize(
    ("mine", "verdict"),
    [
        (row(WHOLE, 1.0, 0.9, 0.8), "yes, the best"),
        (row(APART, 1.0, 0.8), "no, 25% less"),
        (row(CHUNKED, 0.5, 0.4), "no, at least 50% less"),
        (row(CHUNKED, 1.0, 0.89, 0.0), "yes, 4.5% less"),
    ],
)
def test_the_planners_choice_is_judged(mine: Row, verdict: str) -> None:
    found = [mine] if mine.contender == WHOLE else [row(WHOLE, 1.0, 0.9, 0.8), mine]
    line = page._judged(CHAT, found, 1.0, Choice(mine.contender, 2.1))
    assert line[1:3] == [mine.contender, "2.10"]
    assert line[-1] == verdict


def test_the_middle_rate_of_ours_is_drawn_by_scale() -> None:
    found = [row(APART, 1.0, 0.8, 0.5), row(WHOLE, 1.0, 0.9, 0.8), row(VLLM_APART, 0.1)]
    assert figures.shared_rate(found) == 2.0
    assert figures.shared_rate(found[2:]) == 1.0


def test_rates_that_cannot_hold_a_goodput_are_left_out(recording: Recording) -> None:
    (run,) = row(VLLM_APART, 0.8).runs
    recording.add(replace(run, key=run.key._replace(rate=4.0)))
    recording.add(replace(run, key=run.key._replace(plan=WHOLE, rate=4.0)))
    assert not results.pointless(Key(WHOLE, CHAT.workload, 8.0, 0, 0), CHAT, recording)  # over half
    above = Key(VLLM_APART, CHAT.workload, 8.0, 0, 0)
    assert results.pointless(above, CHAT, recording)
    assert not results.pointless(above._replace(rate=2.0), CHAT, recording)
    assert not results.pointless(above._replace(plan=VLLM), CHAT, recording)
    assert SCALES[-1] == max(SCALES)
    said = page._missing([(CHAT, results.rows(CHAT, recording))], recording)
    assert VLLM_APART not in said
    assert VLLM in said
