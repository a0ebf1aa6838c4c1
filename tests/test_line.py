"""Messages over a socket: whole, in order, however the bytes were portioned; and what a peer that is gone means."""

from __future__ import annotations

import asyncio
import itertools
import socket
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve.line import SIZE, Caller, Line, WaitingLine, adopt, connect, listen
from distserve.plan import Role
from distserve.serve.messages import Loading, Stop, encode
from distserve.serve.rpc import RemoteInstance
from distserve.serve.switchboard import Switchboard, identity


def run(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(10):
            await work

    asyncio.run(bounded())


class Inbox:
    """Takes messages and lets a test wait for them."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self._more = asyncio.Event()

    def hear(self, message: bytes) -> None:
        self.messages.append(message)
        self._more.set()

    async def expect(self, messages: list[bytes]) -> None:
        while len(self.messages) < len(messages):
            self._more.clear()
            await self._more.wait()
        assert self.messages == messages


@given(st.lists(st.binary(max_size=40)), st.lists(st.integers(0, 200)))
def test_messages_come_out_whole_however_they_were_portioned(sent: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(len(message).to_bytes(SIZE, "little") + message for message in sent)
    received: list[bytes] = []
    line = Line(received.append)
    borders = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    for start, end in itertools.pairwise(borders):
        line.data_received(stream[start:end])
    assert received == sent


def test_both_ways_in_order_and_large(tmp_path: Path) -> None:
    sent = [bytes([i % 256]) * (i * 997 % 5000) for i in range(500)] + [b"x" * (3 << 20), b"last"]

    async def work() -> None:
        echoed = Inbox()

        def accept() -> Line:
            line = Line(lambda message: line.send(message))
            return line

        server = await listen(str(tmp_path / "socket"), accept)
        line = await connect(str(tmp_path / "socket"), echoed.hear)
        for message in sent:
            line.send(message)
        await echoed.expect(sent)
        line.close()
        await line.lost.wait()
        server.close()

    run(work())


def test_what_was_sent_before_closing_arrives(tmp_path: Path) -> None:
    async def work() -> None:
        received: list[bytes] = []
        gone = asyncio.Event()
        server = await listen(str(tmp_path / "socket"), lambda: Line(received.append, gone.set))
        line = await connect(str(tmp_path / "socket"), received.append)
        line.send(b"farewell" * 100_000)
        line.close()
        assert line.closed
        with pytest.raises(ConnectionError, match="closed"):
            line.send(b"too late")
        await gone.wait()
        assert received == [b"farewell" * 100_000]
        server.close()

    run(work())


def test_a_caller_opens_its_line_with_the_first_message(tmp_path: Path) -> None:
    async def work() -> None:
        inbox = Inbox()
        lines: list[Line] = []

        def accept() -> Line:
            lines.append(Line(inbox.hear))
            return lines[-1]

        server = await listen(str(tmp_path / "socket"), accept)
        caller = Caller(str(tmp_path / "socket"))
        caller.send(b"1")
        caller.send(b"2")
        await inbox.expect([b"1", b"2"])
        caller.send(b"3")
        await inbox.expect([b"1", b"2", b"3"])
        assert len(lines) == 1
        caller.close()
        await lines[0].lost.wait()
        server.close()

    run(work())


def test_a_caller_whose_peer_is_gone_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        caller = Caller(str(tmp_path / "nobody"))
        caller.send(b"1")
        await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()})
        caller.close()

    run(work())
    assert "nobody cannot be reached" in caplog.text


def test_the_switchboard_knows_who_calls(tmp_path: Path) -> None:
    async def work() -> None:
        board = Switchboard(str(tmp_path / "board"))
        await board.start()
        remote = RemoteInstance("decode-0", Role.DECODE, lambda: 7.0)
        loading: asyncio.Queue[Loading] = asyncio.Queue()
        remote.on_loading = loading.put_nowait
        send = board.open_line(remote, 5)
        remote.begin(5, send)
        with pytest.raises(ConnectionError, match="not connected"):
            send(Stop(5))
        inbox = Inbox()
        stranger = await connect(board.address, inbox.hear)
        stranger.send(identity("decode-0", 4))  # an epoch that is over
        await stranger.lost.wait()
        line = await connect(board.address, inbox.hear)
        line.send(identity("decode-0", 5))
        line.send(b"\xc1 is no message")  # reported, and the line lives on
        line.send(encode(Loading(5, 0.5, "weights")))
        assert await loading.get() == Loading(5, 0.5, "weights")
        send(Stop(5))
        await inbox.expect([encode(Stop(5))])
        board.close_line(remote, 5)
        await line.lost.wait()
        with pytest.raises(ConnectionError, match="not connected"):
            send(Stop(5))
        board.close()

    run(work())


def test_a_process_that_waits_answers_until_its_peer_is_gone() -> None:
    async def work() -> None:
        ours, theirs = socket.socketpair()
        answers: list[int] = []

        def answer() -> None:
            line = WaitingLine(theirs)
            while (message := line.receive()) is not None:
                line.send(message[::-1])
            answers.append(len(answers))
            line.close()

        thread = threading.Thread(target=answer)
        thread.start()
        inbox = Inbox()
        line = await adopt(ours, inbox.hear)
        sent = [b"", b"ab", bytes(range(256)) * 3000]
        for message in sent:
            line.send(message)
        await inbox.expect([message[::-1] for message in sent])
        line.close()
        await line.lost.wait()
        await asyncio.to_thread(thread.join)
        assert answers == [0]

    run(work())


def test_half_a_message_is_none() -> None:
    ours, theirs = socket.socketpair()
    line = WaitingLine(theirs)
    ours.sendall((5).to_bytes(SIZE, "little") + b"abc")
    ours.close()
    assert line.receive() is None
    with pytest.raises(ConnectionError):
        line.send(b"anybody there?")
    line.close()
