"""What is said about one run: what counts, what spoils the figures, and when a run for a verdict ends."""

from __future__ import annotations

import asyncio

import pytest

from distserve.bench import measure
from distserve.bench.client import UNFINISHED, Result, clock
from distserve.bench.load import Run
from distserve.bench.measure import Offer, Outcome, Until
from distserve.bench.stream import Answer
from distserve.metrics import SLO, Record
from distserve.traces import Arrival
from distserve.workload import Workload


def workload(number: int, gap: float = 0.001, rate: float | None = 1000.0) -> Workload:
    return Workload("w", tuple(Arrival(i * gap, 10, 3) for i in range(number)), timed=True, rate=rate)


def record(request: Arrival, ttft: float = 0.1, status: str = "ok") -> Record:
    return Record(request.arrival, 10, 3, ttft, 0.01, status)


async def go(offer: Offer, slo: SLO, answer: object = None) -> Outcome:
    """A run whose answers take what `answer(number)` says: seconds of TTFT, or None: they never come."""
    answers: dict[int, Answer] = {}

    async def send(number: int, request: Arrival, due: float) -> Result:
        answers[number] = Answer()
        ttft = answer(number) if callable(answer) else 0.1
        if ttft is None:
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        del answers[number]
        return Result(record(request, ttft), clock(), 0.0, request)

    one = measure.prepared(offer, slo, send, lambda *_: None, answers)
    await asyncio.wait_for(one.load.go(), 30)
    outcome = measure.told(one, 2, [], True)
    assert outcome is not None
    return outcome


async def test_a_verdict_ends_the_run_when_the_goal_is_out_of_reach() -> None:
    offer = Offer(workload(2000), 0.0, until=Until(1000, 0.9))
    outcome = await go(offer, SLO(ttft=1.0), lambda number: 5.0)
    assert 101 <= len(outcome.records) < 500
    assert not outcome.run.interrupted
    assert outcome.report.attainment.joint == 0.0


async def test_a_verdict_waits_for_all_that_count_and_no_longer() -> None:
    offer = Offer(workload(4000), 0.02, until=Until(200, 0.9))
    outcome = await go(offer, SLO(ttft=1.0))
    assert len(outcome.records) == 200  # those behind them kept up the load
    assert len(outcome.counted) == 180
    assert outcome.report.attainment.joint == 1.0
    assert outcome.run.offered < 4000


async def test_requests_that_hang_are_not_forgotten() -> None:
    """The slow ones are in flight when a run is stopped: leaving them out would flatter."""
    offer = Offer(workload(30), 0.0, until=Until(30, 0.9))
    outcome = await go(offer, SLO(ttft=1e-9), lambda number: None if number % 2 else 5.0)
    assert outcome.report.failed.get(UNFINISHED, 0) >= 1
    assert {record.status for record in outcome.records} == {"ok", UNFINISHED}


def told(run: Run, rate: float | None = 10.0, slo: SLO | None = None) -> Outcome:
    async def send(number: int, request: Arrival, due: float) -> Result:
        raise AssertionError

    offer = Offer(workload(400, 0.1, rate), 0.0)
    one = measure.prepared(offer, slo or SLO(), send, lambda *_: None, {})
    run.origin = 0.0
    one.load.run = run
    outcome = measure.told(one, None, [], True)
    assert outcome is not None
    return outcome


def results(late: float = 0.0, slope: float = 0.0, ttft: float = 0.1) -> list[Result]:
    """`late`: seconds by which all leave late; `slope`: by how much more each does than the one before."""
    requests = workload(400, 0.1).arrivals
    return [
        Result(record(request, ttft), request.arrival + 0.2, late + i * slope, request)
        for i, request in enumerate(requests)
    ]


def test_a_client_that_keeps_time_says_nothing() -> None:
    outcome = told(Run(400, results(late=0.002), lags=[0.001] * 50, cpu=2.0, seconds=40.0))
    assert (outcome.bottleneck, outcome.kept_up, outcome.warnings) == ("", True, [])
    client = outcome.to_dict()["client"]
    assert client == {"cpu": 0.05, "late_p99": 0.002, "lag_p99": 0.001, "sent_share": 1.0, "bottleneck": False}


def test_a_late_client_says_so() -> None:
    outcome = told(Run(400, results(late=0.05), lags=[0.02] * 50, cpu=2.0, seconds=40.0))
    assert "at p99 requests left 50 ms late and its loop lagged 20 ms" in outcome.bottleneck
    assert outcome.kept_up
    lax = told(Run(400, results(late=0.05, ttft=2.0), cpu=2.0, seconds=40.0))
    assert lax.bottleneck == ""  # a fortieth of the latency


def test_a_busy_client_says_so() -> None:
    assert "it used 95% of a core" in told(Run(400, results(), cpu=38.0, seconds=40.0)).bottleneck


def test_a_rate_that_the_client_cannot_offer_is_said() -> None:
    outcome = told(Run(400, results(slope=0.1), cpu=2.0, seconds=80.0))
    assert not outcome.kept_up
    assert "asked to offer 10 requests/s, it sent 5/s" in outcome.bottleneck
    assert outcome.to_dict()["client"]["bottleneck"] is True


def test_queues_that_grow_and_runs_that_are_short_are_said() -> None:
    requests = workload(400, 0.1).arrivals
    growing = [Result(record(r, 0.1 + i * 0.05), r.arrival + 30, 0.0, r) for i, r in enumerate(requests)]
    outcome = told(Run(400, growing, cpu=1.0, seconds=60.0))
    assert outcome.growing
    assert any(warning.startswith("queues still grow: TTFT grows from") for warning in outcome.warnings)
    outcome = told(Run(400, results(ttft=30.0), cpu=1.0, seconds=60.0))
    assert not outcome.growing
    assert any(warning.startswith("too short to settle") for warning in outcome.warnings)
    assert told(Run(400, results(ttft=30.0), cpu=1.0, seconds=60.0), rate=None).unsteady == ""  # a replay is what it is


def test_a_server_that_went_away_has_no_queues_to_judge() -> None:
    found = results()
    for i in range(200, 400):
        found[i] = Result(record(found[i].asked, status="unreachable"), 0.2, 0.0, found[i].asked, "Connection refused")
    outcome = told(Run(400, found, cpu=1.0, seconds=60.0))
    assert outcome.warnings[0] == "200 requests unreachable, the first: Connection refused"
    assert not any("queues still grow" in warning or "too short" in warning for warning in outcome.warnings)
    assert outcome.unsteady == "the server was not there for 200 of the requests that count"


def test_the_clients_own_limit_is_not_the_servers_fault() -> None:
    found = results()
    request = found[0].asked
    found[0] = Result(record(request, status="client_limit"), 0.2, 0.0, request, "Too many open files")
    warning = told(Run(400, found, cpu=1.0, seconds=60.0)).warnings[0]
    assert warning == "1 requests client_limit, the first: Too many open files: let it open more files (ulimit -n)"


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_an_empty_or_single_run_is_told(share: float) -> None:
    async def send(number: int, request: Arrival, due: float) -> Result:
        raise AssertionError

    one = measure.prepared(Offer(workload(3), share), SLO(), send, lambda *_: None, {})
    assert measure.told(one, None, [], True) is None
    one.load.run.results.append(results()[0])
    assert measure.told(one, None, [], True) is not None
