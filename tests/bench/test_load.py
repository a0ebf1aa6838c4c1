"""The open loop, with sends that a test answers when it likes."""

from __future__ import annotations

import asyncio

import pytest

from distserve.bench import load as loads
from distserve.bench.client import UNREACHABLE, Result, clock
from distserve.bench.load import Load
from distserve.metrics import Record
from distserve.traces import Arrival


def arrivals(*times: float) -> list[Arrival]:
    return [Arrival(time, 1, 1) for time in times]


def result(request: Arrival, status: str = "ok") -> Result:
    return Result(Record(request.arrival, 1, 1, ttft=0.0, status=status), clock(), 0.0, request)


async def test_requests_leave_on_time_whatever_became_of_the_others() -> None:
    sent: list[tuple[int, float, float]] = []
    release = asyncio.Event()

    async def send(number: int, request: Arrival, due: float) -> Result:
        sent.append((number, due, clock()))
        if len(sent) == 4:
            release.set()
        await release.wait()  # the first ones are answered only when the last was sent: a closed loop would hang here
        return result(request)

    prepared: list[int] = []
    load = Load(arrivals(10.0, 10.05, 10.05, 10.2), send, lambda number, _: prepared.append(number))
    run = await asyncio.wait_for(load.go(), 30)
    assert [number for number, _, _ in sent] == prepared == [0, 1, 2, 3]
    assert [due - run.start for _, due, _ in sent] == pytest.approx([0, 0.05, 0.05, 0.2])
    assert all(at >= due for _, due, at in sent)
    assert (run.offered, len(run.results), run.interrupted) == (4, 4, False)
    assert run.end >= 10.2


async def test_stop_drops_what_is_in_flight() -> None:
    waiting = asyncio.Event()
    dropped: list[int] = []

    async def send(number: int, request: Arrival, due: float) -> Result:
        if number == 0:
            return result(request)
        waiting.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            dropped.append(number)
            raise
        raise AssertionError

    load = Load(arrivals(0.0, 0.0, 3600.0), send, lambda *_: None)
    going = asyncio.create_task(load.go())
    await asyncio.wait_for(waiting.wait(), 30)
    await asyncio.sleep(0)
    load.stop()
    run = await asyncio.wait_for(going, 30)
    assert run.interrupted
    assert dropped == [1]
    assert (run.offered, len(run.results), run.in_flight) == (2, 1, 1)


async def test_a_server_that_is_gone_for_good_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loads, "GIVE_UP", 0.05)

    async def send(number: int, request: Arrival, due: float) -> Result:
        return result(request, UNREACHABLE)

    run = await asyncio.wait_for(Load(arrivals(0.0, 0.02, 0.3, 0.31, 3600.0), send, lambda *_: None).go(), 30)
    assert run.gave_up
    assert run.offered == len(run.results) == 5
    assert [r.record.status for r in run.results] == [UNREACHABLE] * 5
    assert [r.record.arrival for r in run.results] == [0.0, 0.02, 0.3, 0.31, 3600.0]


async def test_one_answer_in_between_means_it_is_not_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loads, "GIVE_UP", 0.05)

    async def send(number: int, request: Arrival, due: float) -> Result:
        return result(request, UNREACHABLE if number % 2 else "ok")

    run = await asyncio.wait_for(Load(arrivals(0, 0.01, 0.04, 0.05, 0.08, 0.2, 0.21), send, lambda *_: None).go(), 30)
    assert not run.gave_up


async def test_our_own_mistakes_are_raised() -> None:
    async def send(number: int, request: Arrival, due: float) -> Result:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(Load(arrivals(0.0, 3600.0), send, lambda *_: None).go(), 30)

    def prepare(number: int, request: Arrival) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        await asyncio.wait_for(Load(arrivals(0.0, 3600.0), send, prepare).go(), 30)


async def test_the_loops_own_lateness_is_seen() -> None:
    async def send(number: int, request: Arrival, due: float) -> Result:
        until = clock() + 0.2
        while clock() < until:
            pass  # keeps the loop busy, as a client that is too slow does
        return Result(Record(request.arrival, 1, 1), clock(), max(0.0, clock() - 0.2 - due), request)

    run = await asyncio.wait_for(Load(arrivals(0.0, 0.0, 0.0, 0.3), send, lambda *_: None).go(), 30)
    late, lag = loads.lateness(run)
    assert late > 0.3
    assert lag > 0.1
