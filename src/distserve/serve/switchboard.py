"""The gateway's one socket to all of its instances: who sent this, and to whom does that go.

An instance's process connects under an identity that names its epoch, so that two processes that followed each other
under one name are never mistaken for one another.
"""

from __future__ import annotations

import logging

import msgspec
import zmq

from distserve.serve.endpoint import Endpoint
from distserve.serve.messages import ToInstance, decode_to_gateway, encode
from distserve.serve.rpc import RemoteInstance, Send

log = logging.getLogger(__name__)


def identity(name: str, epoch: int) -> bytes:
    return f"{name}.{epoch}".encode()


class Switchboard:
    """Binds `address` and hands each message to the `RemoteInstance` it belongs to."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self.address = address
        self._endpoint = Endpoint(context, zmq.ROUTER, self._receive)
        self._endpoint.bind(address)
        self._remotes: dict[bytes, RemoteInstance] = {}

    def start(self) -> None:
        self._endpoint.start()

    def open_line(self, remote: RemoteInstance, epoch: int) -> Send:
        """The line to the process that will connect as this epoch."""
        peer = identity(remote.name, epoch)
        self._remotes[peer] = remote

        def send(message: ToInstance) -> None:
            self._endpoint.send(peer, encode(message))

        return send

    def close_line(self, remote: RemoteInstance, epoch: int) -> None:
        self._remotes.pop(identity(remote.name, epoch), None)

    def _receive(self, frames: list[bytes]) -> None:
        remote = self._remotes.get(frames[0])
        if remote is None:
            log.debug("ignored a message from %r, whose epoch is over", frames[0])
            return
        try:
            message = decode_to_gateway(frames[1])
        except msgspec.DecodeError as error:
            log.error("%s sent what cannot be read: %s", remote.name, error)
            return
        remote.receive(message)

    def close(self) -> None:
        self._endpoint.close()
