"""What was measured on a real machine, beside the simulator of today: the document holds what the record and the
simulator say now, so that a twin that drifts is noticed, without a server and without a clock."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest
from experiments.accuracy import live
from experiments.accuracy.__main__ import DOCS
from experiments.live_goodput import page, results
from experiments.live_goodput.__main__ import main
from experiments.live_goodput.cases import CASES, GOAL
from experiments.live_goodput.contenders import APART, CHUNKED, OURS, WHOLE, label
from experiments.live_goodput.peers import RoundRobin
from experiments.live_goodput.same_weather import in_the_same_weather, weathers
from tests.bench.standin import serving
from tests.scripts import script
from tests.validate.support import MODEL, load_costs, run_of, write_costs

from distserve.bench.client import clock
from distserve.cluster import Cluster
from distserve.costs.choose import choose_costs
from distserve.metrics import SLO, Targets
from distserve.planner.ask import Question, World, ask
from distserve.planner.demand import Demand
from distserve.planner.goodput import ROUGH
from distserve.planner.jobs import Jobs
from distserve.planner.search import Search
from distserve.traces import Arrival
from distserve.validate import grid
from distserve.validate.record import Chosen, Key, Recording
from distserve.validate.steps import Step

CHAT = CASES[0]


# In a process of its own, where the modules are compiled: a quarter of the time.
SCRIPT = """
import json
from experiments.accuracy import live, vectors
from experiments.accuracy.__main__ import of_our_server

page = of_our_server()
cells = [*live.live().comparison.cells, *live.live(vectors.RUNS, vectors.COSTS).comparison.cells]
predicted = [
    (len(cell.runs.measured[0].records), len(each.records), all(record.ok for record in each.records))
    for cell in cells
    for each in cell.runs.imagined
]
print(json.dumps([page, predicted]))
"""


@pytest.fixture(scope="module")
def now() -> tuple[str, list[tuple[int, int, bool]]]:
    """(the document's live part, (requests of a run, those imagined, whether all were answered) by cell and moment)."""
    page, predicted = json.loads(script(SCRIPT, cwd=DOCS.parent))
    return page, predicted


def test_the_document_says_what_record_and_simulator_say_now(now: tuple[str, list[tuple[int, int, bool]]]) -> None:
    written = (DOCS / "accuracy.md").read_text(encoding="utf-8")
    said = written.partition(live.TITLE)
    assert said[1] + said[2] == now[0], (
        "the predictions of the recorded runs have changed: look whether they became worse, then run "
        "python -m experiments.accuracy live"
    )


def test_every_recorded_request_is_predicted(now: tuple[str, list[tuple[int, int, bool]]]) -> None:
    assert len(now[1]) > 2 * 90  # at several moments
    for measured, predicted, all_ok in now[1]:
        assert predicted == measured
        assert all_ok


def test_the_best_has_attained_what_it_is_called_best_for() -> None:
    """Two ways to serve chat that are hard to tell apart: the one that was climbed to its goodput goes first, not the
    one of which only a bound is known."""
    costs = choose_costs(MODEL, "cpu", live.COSTS)
    where = World(costs, Cluster("cpu", 1, 2, 5e9), {"": Demand(CHAT.lengths.workload, Targets(CHAT.slo), GOAL)}, MODEL)
    with Jobs(where) as jobs:
        search = Search(where, jobs)
        first, *others = search.highest()
    assert others
    assert all(each.goodput <= first.goodput for each in others)
    question = Question(first.plan, first.goodput, search.stay(first.deployment), length=ROUGH)
    assert ask(where, question).attains


@pytest.fixture
def recording(tmp_path: Path) -> Recording:
    """Chat under two contenders of ours, lived by the simulator in place of a machine."""
    costs = load_costs(write_costs(tmp_path / "costs.json"))
    found = Recording(tmp_path / "runs.jsonl", MODEL, "somewhere", "some version")
    found.begin()
    found.add_chosen("all", CHAT.workload, Chosen((1.0, 4.0, 9.0), (CHAT.slo,)))
    for name, plan in ((APART, "1p1d"), (WHOLE, "2c-whole")):
        served = grid.pinned(grid.PLANS[plan], costs, MODEL, "cpu")
        found.add_plan(label(name, CHAT), served, served)
        coefficients = costs.latency(1, 1).coefficients
        twice = Step(0.0, 2 * coefficients.prompts(64, 4096), 64, 4096, 0, 0)
        steps = {replica.name: (twice,) for replica in served.replicas()}  # prompts were slow, always
        for rate in (1.0, 4.0, 9.0):
            drawn = CHAT.lengths.workload.draw(rate, 150)
            found.add(replace(run_of(Key(name, CHAT.workload, rate, 0, 0), served, costs, drawn), steps=steps))
    return found


def test_all_of_ours_in_the_same_weather(recording: Recording, tmp_path: Path) -> None:
    costs = load_costs(tmp_path / "costs.json")
    seen = weathers(CHAT, recording, costs)
    assert len(seen) == 3  # the colocated runs
    assert all(pace.prompts == pytest.approx(2.0, abs=1e-3) for run in seen for core in run for pace in core.paces)
    same = in_the_same_weather(CHAT, recording, costs)
    assert [row.contender for row in same] == [APART, WHOLE]
    for slow, measured in zip(same, results.rows(CHAT, recording), strict=True):
        assert len(slow.runs[0].records) == 3 * len(measured.runs[0].records)
        assert all(a <= b + 1e-9 for (_, a), (_, b) in zip(slow.curve(CHAT.slo), measured.curve(CHAT.slo), strict=True))


def test_goodput_is_read_off_the_measured_rates(recording: Recording) -> None:
    found = results.rows(CHAT, recording)
    assert [row.contender for row in found] == [APART, WHOLE]
    for row in found:
        shares = [share for _, share in row.curve(SLO(0.5, 0.05))]
        assert shares[0] > GOAL > shares[-1]
        goodput = row.goodput(SLO(0.5, 0.05))
        assert goodput is not None
        assert 1 < goodput < 9
        by_scale = [share for _, share in row.scales(4.0)]
        assert by_scale == sorted(by_scale)
        assert results.bounds(row, SLO(1e-3, 1e-3)) == "below 1"
        assert results.bounds(row, SLO(1e3, 1e3)) == "over 9"
    assert results.ranked(found, SLO(0.5, 0.05))[0] in found


def test_the_planner_chooses_one_of_ours_or_says_what_else(tmp_path: Path) -> None:
    found = results.choice(CHAT, load_costs(write_costs(tmp_path / "costs.json")), 2.0)
    assert found.contender in (*OURS, "1 colocated, tp 1, pp 2")
    assert found.goodput


def test_the_page_says_what_was_measured_and_what_was_not(
    recording: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "choice", lambda case, costs, scale: results.Choice(WHOLE, 4.0))
    costs = tmp_path / "costs.json"
    arguments = ["--costs", str(costs), "--record", str(recording.path), "--seconds", "0", "--out", str(tmp_path)]
    assert main(arguments) == 0
    text = (tmp_path / "goodput.md").read_text()
    assert "## Chat" in text
    assert "1 prefill + 1 decode 100%, 2 colocated, whole prompts 100%" in text  # of the steps were slow
    assert "**Chat in the same weather for all, simulated**" in text
    assert "planner" in text
    assert f"- chat: {CHUNKED}; 2x vLLM" in text
    assert "- code completion: nothing" in text
    assert (tmp_path / "images" / page.IMAGE).read_text().startswith("<?xml")
    again = (tmp_path / "images" / page.IMAGE).read_bytes()
    assert main(arguments) == 0
    assert (tmp_path / "images" / page.IMAGE).read_bytes() == again


def test_contenders_are_ours_with_sizes_written_down(tmp_path: Path) -> None:
    from experiments.live_goodput.contenders import contenders

    costs = load_costs(write_costs(tmp_path / "costs.json"))
    found = contenders(CHAT, costs, OURS)
    assert [contender.name for contender in found] == list(OURS)
    chunked = found[-1].plan
    assert chunked is not None
    assert chunked.instances[0].chunk_tokens in (256, 512, 1024)


def test_a_round_robin_takes_turns() -> None:
    async def go(urls: list[str]) -> list[str]:
        async with RoundRobin(urls) as client:
            body = b'{"prompt": [5, 6], "max_tokens": 2, "stream": true}'
            sent = [await client.send("/v1/completions", body, Arrival(0, 2, 2), clock()) for _ in range(5)]
        return [result.record.status for result in sent]

    with serving() as one, serving() as two:
        assert asyncio.run(go([one.url, two.url])) == ["ok"] * 5
        assert (len(one.bodies), len(two.bodies)) == (3, 2)


def test_a_case_that_is_not_known_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["--cases", "poetry"])
    assert error.value.code == 2
    assert "poetry" in capsys.readouterr().err
