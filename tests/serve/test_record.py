"""`serve --record`: what is written, when, and how much; and that it is a workload. Never what anybody said."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.serve.live import serving
from tests.serve.rig import Rig

from distserve.errors import InstanceError, OverloadedError, UnavailableError, UsageError
from distserve.plan import Role
from distserve.request import FinishReason, Request, SamplingParams
from distserve.serve.options import ServeOptions
from distserve.serve.record import Deaf, Recorder, recording
from distserve.serve.stream import RequestStream
from distserve.workload import Workload


@dataclass
class Ended:
    """A request that is over."""

    request: Request
    first: float = 0.0
    last: float = 0.0
    finish: FinishReason | None = None
    error: Exception | None = None


def ended(arrival: float, prompt: int, output: int, **fields: object) -> Ended:
    asked = Request(1, [7] * prompt, SamplingParams(max_tokens=99), arrival, output=[8] * output)
    return Ended(asked, **fields)  # type: ignore[arg-type]


ANSWERED = ended(1.0, 5, 3, first=1.25, last=1.75, finish=FinishReason.STOP)


@dataclass
class Timer:
    """Calls back when a test says so."""

    armed: list[Callable[[], None]] = field(default_factory=list)

    def later(self, seconds: float, callback: Callable[[], None]) -> None:
        self.armed.append(callback)

    def strike(self) -> None:
        armed, self.armed = self.armed, []
        for callback in armed:
            callback()


def recorder(path: Path, timer: Timer | None = None, limit: int = 1 << 20) -> Recorder:
    return Recorder(path, later=(timer or Timer()).later, clock=lambda: 0.0, limit=limit)


@pytest.mark.parametrize("name", ["traffic.csv", "traffic.jsonl"])
def test_what_is_recorded_is_a_workload(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    record = recorder(path)
    record.note(ANSWERED)
    record.note(ended(0.5, 4, 1, first=0.75, last=0.75, finish=FinishReason.LENGTH))  # came first, ended later
    record.note(ended(2.0, 6, 0, error=OverloadedError("full", 1.0)))
    record.close()
    workload = Workload.load(path)
    assert [(r.prompt_tokens, r.output_tokens) for r in workload] == [(4, 1), (5, 3), (6, 2)]
    assert [r.arrival for r in workload] == pytest.approx([0.0, 0.5, 1.5], abs=1e-5)
    assert workload.timed


def test_outcomes_stand_beside_the_lengths(tmp_path: Path) -> None:
    record = recorder(tmp_path / "t.jsonl")
    cases: list[Ended] = [
        ANSWERED,
        ended(1, 1, 0, error=OverloadedError("full", 1)),
        ended(1, 1, 0, error=UnavailableError("gone")),
        ended(1, 1, 2, first=1.5, last=2.0, error=InstanceError("gone")),
        ended(1, 1, 2, first=1.5, last=2.0),
    ]
    for case in cases:
        record.note(case)
    record.close()
    rows = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert [row["status"] for row in rows] == ["ok", "refused", "unavailable", "server_error", "cancelled"]
    assert (rows[0]["ttft"], rows[0]["tpot"], rows[0]["max_tokens"]) == (0.25, 0.25, 99)
    assert (rows[1]["ttft"], rows[1]["tpot"]) == (None, None)
    assert set(rows[0]) == {"arrival", "prompt_tokens", "output_tokens", "ttft", "tpot", "status", "max_tokens"}


def test_rows_wait_for_the_timer_or_for_many(tmp_path: Path) -> None:
    path, timer = tmp_path / "t.csv", Timer()
    record = recorder(path, timer)
    record.note(ANSWERED)
    record.note(ANSWERED)
    assert len(path.read_text().splitlines()) == 1  # the names of the columns
    assert len(timer.armed) == 1
    timer.strike()
    assert len(path.read_text().splitlines()) == 3
    for _ in range(2000):
        record.note(ANSWERED)
    assert len(path.read_text().splitlines()) > 1000  # without the timer
    record.close()
    assert len(path.read_text().splitlines()) == 2003
    record.note(ANSWERED)  # of a request that outlives the recording
    timer.strike()
    assert len(path.read_text().splitlines()) == 2003


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_two_files_of_bounded_size_are_kept(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"t{suffix}"
    record = recorder(path, limit=4096)
    for _ in range(500):
        record.note(ANSWERED)
        record.flush()
    record.close()
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"t.1{suffix}", f"t{suffix}"]
    sizes = [file.stat().st_size for file in tmp_path.iterdir()]
    assert max(sizes) <= 4096
    assert len(Workload.load(tmp_path / f"t.1{suffix}")) > 20


def test_a_restart_appends_and_mends_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    first = recorder(path)
    first.note(ANSWERED)
    first.close()
    with path.open("a") as file:
        file.write("1700000000.0,10,")  # the power failed
    second = recorder(path)
    second.note(ANSWERED)
    second.close()
    assert len(Workload.load(path)) == 2
    assert path.read_text().count("arrival") == 1


def test_a_full_disk_ends_the_recording_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "t.csv"
    record = recorder(path)
    record.note(ANSWERED)
    record.flush()
    before = path.read_text()

    def full(file: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("distserve.serve.rows.os.write", full)
        record.note(ANSWERED)
        record.flush()
    record.note(ANSWERED)
    record.close()
    assert "No space left on device" in caplog.text
    assert path.read_text() == before


async def test_nothing_is_recorded_unless_asked_for() -> None:
    deaf = recording(None, None, clock=lambda: 0.0)
    assert isinstance(deaf, Deaf)
    deaf.note(ANSWERED)
    deaf.close()


def test_wrong_files_are_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"ends in \.csv or \.jsonl"):
        recorder(tmp_path / "traffic.txt")
    with pytest.raises(UsageError, match="cannot be written: No such file or directory"):
        recorder(tmp_path / "none" / "t.csv")
    with pytest.raises(UsageError, match="--record-size 10 is too small"):
        recorder(tmp_path / "t.csv", limit=10)
    with pytest.raises(UsageError, match="give --record FILE with it"):
        ServeOptions(record_size=1 << 20)


async def test_the_gateway_tells_of_every_end() -> None:
    heard: list[tuple[int, str | None, str]] = []

    def note(stream: RequestStream) -> None:
        heard.append((len(stream.request.output), stream.finish, type(stream.error).__name__))

    async with Rig({"both": Role.COLOCATED}) as rig:
        rig.gateway._ended = note
        asked = [Request(rig.gateway.next_id(), [3, 4, 5], SamplingParams(max_tokens=4)) for _ in range(3)]
        async for _ in rig.gateway.generate(asked[0]):
            pass
        left = rig.gateway.generate(asked[1])
        await anext(left)
        left.close()  # the client goes away
        rig.gateway.close_door()
        with pytest.raises(UnavailableError):
            await anext(rig.gateway.generate(asked[2]))
    assert heard[0] == (4, "length", "NoneType")
    assert sorted(one[1:] for one in heard[1:]) == [(None, "NoneType"), (None, "UnavailableError")]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_that_ends_or_is_killed_leaves_a_readable_file(tmp_path: Path, how: signal.Signals) -> None:
    path = tmp_path / "traffic.jsonl"
    with serving(tmp_path, "fake", "--record", str(path)) as server:
        server.complete("a secret", max_tokens=3)
        server.complete("another one", max_tokens=5)
        if how == signal.SIGKILL:
            server.wait_for("two rows", lambda: len(path.read_text().splitlines()) == 2)
        server.stop(how)
    assert sorted(r.output_tokens for r in Workload.load(path)) == [3, 5]
    assert "secret" not in path.read_text()
