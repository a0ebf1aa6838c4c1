"""The contract of moving KV between instances: the source publishes blocks, the target pulls them.

    source                                target
    publish(blocks) -> generations, digest
         `---- KVHandle, through the gateway ---->  pull(handle, into)   reads bytes, then checks generations and digest
         <--- pulled notice (serve/rpc.py) -------'

A handle is a promise about bytes, not about memory: the source may break it (its lease ended, it died), and then a pull
raises `PullError`; bytes that were read under a broken promise are never used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from distserve.specs import KVLayout


@dataclass(frozen=True, slots=True)
class KVSource:
    """Where an instance's KV can be read, and where its pulled notices go. Sent once per epoch, carried by handles."""

    instance: str
    epoch: int
    layout: KVLayout
    location: str  # for the transport: which memory (shm: "pid:fd:bytes")
    notices: str  # address that takes pulled notices


@dataclass(frozen=True, slots=True)
class KVHandle:
    """One request's KV, waiting at its source."""

    source: KVSource
    request: int
    attempt: int
    num_tokens: int  # tokens whose KV the blocks hold
    blocks: tuple[int, ...]
    generations: tuple[int, ...]  # of each block when the handle was made
    digest: tuple[int, ...]  # of each block's bytes, as copying.py defines it


class Source(Protocol):
    """The publishing side of a transport; lives as long as the instance's epoch."""

    location: str

    def publish(self, blocks: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(generations, digest) of `blocks` as they are now. The caller keeps the blocks unchanged until released."""
        ...

    def close(self) -> None: ...


class Transport(Protocol):
    """The pulling side."""

    async def connect(self, source: KVSource) -> None:
        """Makes first contact before the first request needs it. Raises `PullError("gone")`."""
        ...

    async def pull(self, handle: KVHandle, into: list[int]) -> int:
        """Reads every block of `handle` into this instance's blocks `into`; returns the bytes read. Raises `PullError`;
        the target blocks then hold garbage."""
        ...

    def disconnect(self, instance: str, epoch: int) -> None:
        """The source's epoch is over: forget its memory; waiting pulls from it fail."""
        ...

    def close(self) -> None: ...
