"""What the ranks of an instance tell each other while they compute: sums within a stage, activations from one stage to
the next. Knows places and tensors; knows no model and nobody who starts ranks.

    stage 0:  rank 0 <-sum-> rank 1         a stage's ranks share each layer and sum their partial products
                |              |
               send           send          the residual stream goes to the same place of the next stage
                v              v
    stage 1:  rank 2 <-sum-> rank 3         the last stage's ranks share the vocabulary; rank 2 gathers the logits

Every rank of a stage makes the same calls in the same order. A rank whose peer died waits for it: whoever started the
ranks ends them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from distserve.engine import host_links
from distserve.engine.parallel import Member, Place

_TIMEOUT = timedelta(days=1)  # a rank may be idle for long; a dead peer is seen by who started it


class Links(Protocol):
    """One rank's ways to the others. Not thread-safe."""

    member: Member  # which one of its stage's ranks it is
    # `sum_` for callers in C: the address of a function (context, values, count) that returns 0, and its context
    summer: tuple[int, int] | None

    def sum_(self, x: Tensor) -> Tensor:
        """Makes `x` (fp32, contiguous) the sum of that of every rank of the stage, in place."""
        ...

    def gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """`x` [R, widths[own index]] of every rank of the stage side by side at its first rank; [0, sum] elsewhere."""
        ...

    def send(self, x: Tensor) -> None:
        """Begins to send `x` (fp32, contiguous; not to be changed any more) to the same place of the next stage."""
        ...

    def receive(self, shape: tuple[int, int]) -> Tensor:
        """The next tensor, of `shape`, that the same place of the stage before has sent."""
        ...

    def close(self) -> None: ...


class _Alone:
    """Of an instance's only rank."""

    member = Member()
    summer: tuple[int, int] | None = None

    def sum_(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        return x

    def send(self, x: Tensor) -> None:
        raise AssertionError("there is no next stage")

    def receive(self, shape: tuple[int, int]) -> Tensor:
        raise AssertionError("there is no stage before")

    def close(self) -> None:
        """Nothing is open."""


ALONE: Links = _Alone()


def connect(place: Place, device: torch.device, rendezvous: Path) -> Links:
    """The links of one rank; returns when all ranks of its instance are here. `rendezvous`: a file that only they use
    and that does not exist before."""
    if place.sharding.num_ranks == 1:
        return ALONE
    native = host_links.library() if device.type == "cpu" else None
    if native is not None:
        return host_links.HostLinks(native, place, rendezvous)
    return ProcessGroups(place, device, rendezvous)


class ProcessGroups:
    """Over torch.distributed: gloo between CPUs, NCCL between GPUs."""

    summer: tuple[int, int] | None = None

    def __init__(self, place: Place, device: torch.device, rendezvous: Path) -> None:
        import torch.distributed as dist

        sharding = place.sharding
        self.member = place.member
        self._place, self._device = place, device
        self._on_their_way: list[tuple[dist.Work, Tensor]] = []
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.FileStore(str(rendezvous), sharding.num_ranks),  # type: ignore[attr-defined]
            rank=place.rank,
            world_size=sharding.num_ranks,
            timeout=_TIMEOUT,
        )
        self._dist = dist
        self._stage: dist.ProcessGroup | None = None
        for first in range(0, sharding.num_ranks, sharding.tp) if sharding.tp > 1 else ():
            group = dist.new_group(list(range(first, first + sharding.tp)), timeout=_TIMEOUT)
            if first == place.stage * sharding.tp:
                self._stage = group

    def sum_(self, x: Tensor) -> Tensor:
        if self._stage is not None:
            self._dist.all_reduce(x, group=self._stage)
        return x

    def gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        if self._stage is None:
            return x
        size, widest = len(x), max(widths)
        padded = x.contiguous()
        if x.shape[1] < widest:
            padded = x.new_zeros((size, widest))
            padded[:, : x.shape[1]] = x
        first = self._place.stage * self.member.size
        if self.member.index:
            self._dist.gather(padded, dst=first, group=self._stage)
            return x.new_empty((0, sum(widths)))
        parts = [torch.empty_like(padded) for _ in widths]
        self._dist.gather(padded, parts, dst=first, group=self._stage)
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)

    def send(self, x: Tensor) -> None:
        # What is on its way must be kept until it arrived.
        self._on_their_way = [(work, sent) for work, sent in self._on_their_way if not work.is_completed()]
        work = self._dist.isend(x, dst=self._place.rank + self.member.size)
        assert work is not None
        self._on_their_way.append((work, x))

    def receive(self, shape: tuple[int, int]) -> Tensor:
        x = torch.empty(shape, dtype=torch.float32, device=self._device)
        self._dist.recv(x, src=self._place.rank - self.member.size)
        return x

    def close(self) -> None:
        for work, _ in self._on_their_way:
            work.wait()
        self._on_their_way.clear()
        self._dist.destroy_process_group()
