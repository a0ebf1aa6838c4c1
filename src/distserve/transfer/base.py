"""The contract of moving KV between instances: the source publishes blocks, the target pulls them.

    source                                target
    publish(blocks) -> generations, digest
         `---- KVHandle, through the gateway ---->  pull(handle, into)   reads bytes, then checks generations and digest
         <--- pulled notice (serve/rpc.py) -------'

Either side is a whole instance, of any tp and pp: a block has one id on all ranks, each of which holds its own layers
and heads of it, and a pull moves all of what a request has, to all ranks, or fails. The pulling side reads for each of
its ranks the ranges of `layout.reads(source, target)`; one process does so for all ranks, and its one notice after the
last byte is what prefill frees the blocks on.

A handle is a promise about bytes, not about memory: the source may break it (its lease ended, it died), and then a pull
raises `PullError`; bytes that were read under a broken promise are never used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableSequence, Sequence
from dataclasses import dataclass
from typing import Protocol

from distserve.errors import PlanError, PullError
from distserve.transfer.layout import InstanceLayout, reads

Stage = Callable[[list[int]], None]  # moves blocks between the device and its host copy; nothing to do on a CPU


@dataclass(frozen=True, slots=True)
class KVSource:
    """Where an instance's KV can be read, and where its pulled notices go. Sent once per epoch, carried by handles."""

    instance: str
    epoch: int
    layout: InstanceLayout  # of all its ranks
    location: str  # "NAME:...", NAME being the transport's; the rest is for it alone: the memory of each rank
    notices: str  # address that takes pulled notices


@dataclass(frozen=True, slots=True)
class KVHandle:
    """One request's KV, waiting at its source."""

    source: KVSource
    request: int
    attempt: int
    num_tokens: int  # tokens whose KV the blocks hold
    blocks: tuple[int, ...]  # the same on every rank
    generations: tuple[int, ...]  # of each block when the handle was made
    digest: tuple[int, ...]  # of each block's bytes on all ranks, as copying.py defines it: the same for any tp and pp


class Source(Protocol):
    """The publishing side of a transport; lives as long as the instance's epoch."""

    location: str

    @property
    def generations(self) -> MutableSequence[int] | memoryview:
        """Of each block; the scheduler's block pool counts here, and readers look here."""
        ...

    def publish(self, blocks: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(generations, digest) of `blocks` as they are now. The caller keeps the blocks unchanged until released."""
        ...

    def close(self) -> None: ...


class Transport(Protocol):
    """The pulling side."""

    async def connect(self, source: KVSource) -> None:
        """Makes first contact before the first request needs it. Raises `PullError`: "gone", or "transport" where the
        two sides do not fit (another model, block size, dtype or transport), with the cure."""
        ...

    async def pull(self, handle: KVHandle, into: list[int]) -> int:
        """Reads every block of `handle` into this instance's blocks `into`, on all ranks; returns the bytes read.
        Raises `PullError`, whichever rank failed; the target blocks then hold garbage on every rank."""
        ...

    def disconnect(self, instance: str, epoch: int) -> None:
        """The source's epoch is over: forget its memory; waiting pulls from it fail."""
        ...

    def close(self) -> None: ...


def refuse(source: KVSource, transport: str, layout: InstanceLayout) -> None:
    """Raises `PullError("transport")`, with the cure, where an instance of this layout cannot pull from `source` by the
    transport of that name."""
    offered = source.location.partition(":")[0]
    if offered != transport:
        raise PullError(
            f"{source.instance} offers its KV by {offered}, this instance pulls by {transport}: give both the same "
            "--transport",
            "transport",
        )
    try:
        reads(source.layout, layout)
    except PlanError as error:
        raise PullError(f"{source.instance}: {error}", "transport") from None


def check(handle: KVHandle, generations: Sequence[int], digests: Iterable[tuple[int, ...]]) -> None:
    """Whether what a pull read is what was promised. `generations` of the handle's blocks, looked at after their bytes
    were read; `digests` of the bytes that were written here, one for each complete set of copies. Raises `PullError`
    ("generation" or "digest")."""
    # Generations first: a block that was reused under the reader has another digest, too, but is not damage.
    if tuple(generations) != handle.generations:
        raise PullError(f"{handle.source.instance} reused the blocks of request {handle.request}", "generation")
    if any(digest != handle.digest for digest in digests):
        raise PullError(f"the KV of request {handle.request} is not what {handle.source.instance} computed", "digest")
