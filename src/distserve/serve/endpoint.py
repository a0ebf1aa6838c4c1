"""A ZeroMQ socket on an asyncio loop, without a task a message: whoever owns it gets whole messages by callback.

pyzmq's own asyncio sockets cost a future and two wake-ups a message; a gateway that passes thousands of tokens a second
feels that. The price is the rule that a ZeroMQ file descriptor signals edges: after each signal everything is read, and
after each send it is looked at again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import zmq

Handler = Callable[[list[bytes]], None]

HIGH_WATER = 100_000  # messages; admission keeps us far below


class Endpoint:
    """`handler` is called with a message's frames, on the loop, in order of arrival."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], kind: int, handler: Handler | None = None) -> None:
        self._socket = context.socket(kind)
        self._socket.set_hwm(HIGH_WATER)
        self._socket.linger = 0
        self._handler = handler
        self._loop: asyncio.AbstractEventLoop | None = None
        if kind == zmq.ROUTER:
            self._socket.router_mandatory = True

    def bind(self, address: str) -> None:
        self._socket.bind(address)

    def connect(self, address: str, identity: bytes | None = None) -> None:
        if identity is not None:
            self._socket.identity = identity
        self._socket.connect(address)

    def start(self) -> None:
        """Begins to call the handler; must be on the loop's thread."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.FD, self._read)
        self._loop.call_soon(self._read)

    def send(self, *frames: bytes) -> None:
        """Never blocks. Raises `ConnectionError` where the peer is not there (ROUTER) or its queue is full."""
        try:
            self._socket.send_multipart(frames, zmq.DONTWAIT, copy=True)
        except zmq.ZMQError as error:
            raise ConnectionError(str(error)) from None
        if self._loop is not None and self._readable():
            self._loop.call_soon(self._read)

    def _read(self) -> None:
        while self._readable():
            frames = self._socket.recv_multipart(zmq.DONTWAIT)
            if self._handler is not None:
                self._handler(frames)

    def _readable(self) -> bool:
        return not self._socket.closed and bool(int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)

    def close(self, linger: int = 0) -> None:
        """`linger`: milliseconds that messages already sent may take to leave (the context waits for them)."""
        if self._loop is not None and not self._socket.closed:
            self._loop.remove_reader(self._socket.FD)
        self._socket.close(linger=linger)
