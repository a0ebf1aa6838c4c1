"""The gateway's one address for all of its instances: who sent this, and to whom does that go.

An instance's process introduces itself by a name that holds its epoch, so that two processes that followed each other
under one name are never mistaken for one another.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial

import msgspec

from distserve.line import Line, listen
from distserve.serve.messages import ToInstance, decode_to_gateway, encode
from distserve.serve.rpc import RemoteInstance, Send

log = logging.getLogger(__name__)


def identity(name: str, epoch: int) -> bytes:
    """The first message on an instance's line."""
    return f"{name}.{epoch}".encode()


class Switchboard:
    """Listens at the Unix-domain socket `address` and hands each message to the `RemoteInstance` it belongs to."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._server: asyncio.Server | None = None
        self._remotes: dict[bytes, RemoteInstance] = {}  # who may call, by identity
        self._lines: dict[bytes, Line] = {}  # who has

    async def start(self) -> None:
        self._server = await listen(self.address, self._accept)

    def open_line(self, remote: RemoteInstance, epoch: int) -> Send:
        """The line to the process that will connect as this epoch."""
        peer = identity(remote.name, epoch)
        self._remotes[peer] = remote

        def send(message: ToInstance) -> None:
            line = self._lines.get(peer)
            if line is None:
                raise ConnectionError("its process is not connected")
            line.send(encode(message))

        return send

    def close_line(self, remote: RemoteInstance, epoch: int) -> None:
        peer = identity(remote.name, epoch)
        self._remotes.pop(peer, None)
        if (line := self._lines.pop(peer, None)) is not None:
            line.close()

    def _accept(self) -> Line:
        line = Line(lambda peer: self._introduced(line, peer))
        return line

    def _introduced(self, line: Line, peer: bytes) -> None:
        remote = self._remotes.get(peer)
        if remote is None:
            log.debug("turned away %r, whose epoch is over", peer)
            line.close()
            return
        self._lines[peer] = line
        line.handler = partial(_receive, remote)

    def close(self) -> None:
        for line in self._lines.values():
            line.close()
        if self._server is not None:
            self._server.close()


def _receive(remote: RemoteInstance, data: bytes) -> None:
    try:
        message = decode_to_gateway(data)
    except msgspec.DecodeError as error:
        log.error("%s sent what cannot be read: %s", remote.name, error)
        return
    remote.receive(message)
