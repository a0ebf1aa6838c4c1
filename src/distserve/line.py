"""Messages between two processes of one host: a Unix-domain socket, each message after its length. `Line` lives on an
event loop, `WaitingLine` in a process that does one thing at a time.

No thread and no queue stand between a process and the socket: a message costs each side a system call and a wake-up
and nothing else. (Where cores sleep between messages, every further thread that must wake costs 0.1 to 0.2 ms.) Carries
bytes; what they mean, and what follows when a peer is gone, is its users' business.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import cast

log = logging.getLogger(__name__)

Handler = Callable[[bytes], None]

SIZE = 4  # bytes of a message's length, in front of it, little-endian
HIGH_WATER = 256 << 20  # bytes that may wait for a peer that does not read; admission keeps us far below


class Line(asyncio.Protocol):
    """One connection. `handler` gets whole messages, on the loop, in order; it may be replaced at any time.
    `on_lost` hears once that the other side is gone, or that this side has closed."""

    def __init__(self, handler: Handler, on_lost: Callable[[], None] | None = None) -> None:
        self.handler = handler
        self.lost = asyncio.Event()
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._rest = b""  # the beginning of a message whose end has not arrived

    @property
    def closed(self) -> bool:
        return self._transport is None or self._transport.is_closing()

    def send(self, message: bytes) -> None:
        """Never blocks. Raises `ConnectionError` where the peer is gone, or has not read for long."""
        if self._transport is None or self._transport.is_closing():
            raise ConnectionError("the line is closed")
        if self._transport.get_write_buffer_size() > HIGH_WATER:
            raise ConnectionError("the peer does not read")
        self._transport.write(len(message).to_bytes(SIZE, "little") + message)

    def close(self) -> None:
        """What was sent still leaves, as far as the peer reads: `lost` is set when it has."""
        if self._transport is not None:
            self._transport.close()

    # -- called by the loop -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(0)  # uvloop then sends at once, not at the end of the loop's turn

    def data_received(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
        start, end = 0, len(data)
        while (first := start + SIZE) <= end:
            last = first + int.from_bytes(data[start:first], "little")
            if last > end:
                break
            self.handler(data[first:last])
            start = last
        self._rest = data[start:]

    def connection_lost(self, error: Exception | None) -> None:
        self.lost.set()
        if self._on_lost is not None:
            self._on_lost()


class WaitingLine:
    """One end of a connected socket, which it owns from now on; nobody else waits in this process meanwhile."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(True)
        self._end = end
        self._incoming = end.makefile("rb", 1 << 16)

    def send(self, message: bytes) -> None:
        """Returns when it has left. Raises `ConnectionError` where the peer is gone."""
        self._end.sendall(len(message).to_bytes(SIZE, "little") + message)

    def receive(self) -> bytes | None:
        """The next message, waited for; None: the peer is gone."""
        try:
            size = self._incoming.read(SIZE)
            message = self._incoming.read(int.from_bytes(size, "little")) if len(size) == SIZE else b""
        except ConnectionError:
            return None
        return message if len(size) == SIZE and len(message) == int.from_bytes(size, "little") else None

    def close(self) -> None:
        self._incoming.close()
        self._end.close()


class Caller:
    """A line that its first message opens; what is sent meanwhile waits. For messages that nobody misses where the
    other side is gone."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._line: Line | None = None
        self._waiting: list[bytes] = []
        self._opening: asyncio.Task[None] | None = None

    def send(self, message: bytes) -> None:
        """Raises `ConnectionError` where there was a line and the peer has gone."""
        if self._line is not None:
            self._line.send(message)
            return
        self._waiting.append(message)
        if self._opening is None or self._opening.done():
            self._opening = asyncio.create_task(self._open())

    async def _open(self) -> None:
        try:
            line = await connect(self._path, _ignore)
            for message in self._waiting:
                line.send(message)
            self._line = line
        except OSError as error:
            log.warning("%s cannot be reached: %s", self._path, error)
        self._waiting = []

    def close(self) -> None:
        if self._opening is not None:
            self._opening.cancel()
        if self._line is not None:
            self._line.close()


def _ignore(message: bytes) -> None:
    """A caller is not answered."""


async def connect(path: str, handler: Handler, on_lost: Callable[[], None] | None = None) -> Line:
    """Raises `OSError` where nobody listens."""
    _, line = await asyncio.get_running_loop().create_unix_connection(lambda: Line(handler, on_lost), path)
    return line


async def adopt(end: socket.socket, handler: Handler, on_lost: Callable[[], None] | None = None) -> Line:
    """The line over one end of a socket that is connected already."""
    loop = asyncio.get_running_loop()
    _, line = await loop.create_unix_connection(lambda: Line(handler, on_lost), sock=end)
    return line


async def listen(path: str, accept: Callable[[], Line]) -> asyncio.Server:
    """`accept` makes the line of each connection."""
    return await asyncio.get_running_loop().create_unix_server(accept, path)
