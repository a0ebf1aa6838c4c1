"""The contract of what computes a batch. Live: torch on this machine's devices; fake: sleeps for the predicted time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from distserve.errors import DistserveError
from distserve.request import Request, Token
from distserve.sched.base import Batch


@dataclass(slots=True)
class EngineResult:
    """What a step produced: one token per sequence that was computed to its end."""

    tokens: dict[int, Token] = field(default_factory=dict)  # by request id
    failures: dict[int, str] = field(default_factory=dict)  # by request id: it cannot go on, and why
    seconds: float = 0.0  # the step's own duration, measured by the executor

    @property
    def ended(self) -> set[int]:
        return {i for i, token in self.tokens.items() if token.finish is not None} | self.failures.keys()


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What an executor needs to be built; comes out of the plan and the command line."""

    model: str  # a folder, a .gguf file (resolved to a local path by the launcher)
    device: str = "cpu"  # "cpu" or "cuda:N"; of several ranks "cpu" or "cuda"
    dtype: str = "auto"  # "auto": the checkpoint's (GGUF: bfloat16), "bfloat16", "float16", "float32"
    block_size: int = 32  # tokens per KV block
    kv_bytes: int = 1 << 30  # KV memory of each rank
    max_model_len: int | None = None  # None: the checkpoint's
    cores: tuple[int, ...] = ()  # CPU cores to pin to (empty: leave alone)
    tp: int = 1
    pp: int = 1
    ranks: tuple[tuple[int, ...], ...] = ()  # several ranks: the CPU cores of each, or its one GPU, in (pp, tp) order

    @property
    def num_ranks(self) -> int:
        return self.tp * self.pp

    def of_rank(self, rank: int) -> EngineOptions:
        """The same for one of several ranks, with its own device or cores."""
        numbers = self.ranks[rank]
        return replace(self, cores=numbers) if self.device == "cpu" else replace(self, device=f"cuda:{numbers[0]}")


class Executor(Protocol):
    """Computes. Not thread-safe: one call at a time. Builds everything in `start`, nothing in the constructor."""

    num_blocks: int
    block_size: int
    max_model_len: int
    max_in_flight: int  # batches that are computed at once, one behind the other: the stages of its pipeline

    async def start(self, progress: Callable[[float, str], None]) -> None:
        """Loads weights, allocates KV, warms up; `progress(fraction, what)`. Raises `ModelError` with the cure."""
        ...

    def add(self, request: Request) -> None:
        """Makes a request's tokens and sampling known before a batch names it."""
        ...

    def launch(self, batch: Batch) -> asyncio.Future[EngineResult]:
        """Starts to compute one batch: writes KV of the scheduled tokens, samples where a sequence is computed to its
        end, and appends the sampled token to the request's tokens. Returns at once; at most `max_in_flight` batches may
        be under way, of different sequences, and they end in the order of their launches."""
        ...

    async def execute(self, batch: Batch) -> EngineResult:
        """One batch, launched and waited for."""
        return await self.launch(batch)

    def forget(self, request_id: int) -> None:
        """The request ended or moved on. Idempotent."""
        ...

    async def stop(self) -> None: ...

    def on_broken(self, tell: Callable[[DistserveError], None]) -> None:
        """`tell` hears, once, that nothing can be computed any more, also while nothing is under way. What has no
        processes of its own does not break between two batches."""
        return None  # noqa: RET501  # mypy takes a body of words alone for an abstract one
