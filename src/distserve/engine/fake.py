"""An executor without a model: takes as long as it is told, answers tokens that only the request determines, and writes
KV that only the tokens determine, so that a test sees at once which block was lost, mixed up or read too early.

No torch, and ranks have no process. The KV of position p is a 64-bit hash of all tokens up to p, repeated with the
row's number mixed in, in every (layer, k|v, head) row of the model, in the memory of each rank that holds it. With
`verify`, each step first reads back what earlier steps and pulls should have left in its sequences' blocks.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from distserve.engine.base import EngineOptions, EngineResult, Executor
from distserve.errors import PlanError, UsageError
from distserve.request import FinishReason, Logprobs, Request, Token
from distserve.sched.base import Batch
from distserve.sched.base import Sequence as ScheduledSequence
from distserve.sharding import Sharding, split_layers
from distserve.specs import KVLayout

Words = NDArray[np.uint64]

TINY_LAYOUT = KVLayout(num_layers=2, num_kv_heads=1, head_dim=4, block_size=16, dtype="float32")
_MASK = 0xFFFF_FFFF_FFFF_FFFF
_GOLDEN = 0x9E37_79B9_7F4A_7C15  # 2**64 / the golden ratio: spreads consecutive numbers (splitmix64)


class KVMismatch(AssertionError):
    """A block does not hold the KV that its sequence's tokens imply."""


@dataclass(frozen=True, slots=True)
class FakeModel:
    """What the fake pretends to be."""

    vocab_size: int = 1000
    eos_token_ids: tuple[int, ...] = (2,)
    max_model_len: int = 8192
    layout: KVLayout = TINY_LAYOUT
    seconds: Callable[[Batch], float] = lambda batch: 0.0  # how long a batch takes in each stage
    host: Callable[[Batch], float] = lambda batch: 0.0  # and before the first one, which may be busy meanwhile
    writes_kv: bool = True  # False: only time passes, for measuring what is around the engine
    # How many tokens a request's answer has where nothing cuts it short: its last is then an end-of-sequence token.
    num_output: Callable[[Request], int] = lambda request: request.sampling.max_tokens + 1

    def sharding(self, tp: int, pp: int) -> Sharding:
        """Among the ranks of an instance. Raises `PlanError` where they do not fit."""
        return Sharding(self.layout.num_kv_heads, split_layers(self.layout.num_layers, pp), tp)


def parse_fake(model: str) -> FakeModel:
    """`fake:step=0.005,token=0.0001,output=50,verify=0,layers=6,heads=3`: seconds a step and a token of it, tokens of
    an answer, whether KV is written and checked, of how many layers and heads. Its tokens are those of the demo model's
    vocabulary."""
    settings = {"step": 0.0, "token": 0.0, "output": math.inf, "verify": 1.0, "layers": 2.0, "heads": 1.0}
    for item in filter(None, model.partition(":")[2].split(",")):
        key, _, value = item.partition("=")
        if key not in settings:
            raise UsageError(f"{model}: {key!r} is unknown; known are {', '.join(settings)}")
        settings[key] = float(value)

    def seconds(batch: Batch) -> float:
        return settings["step"] + settings["token"] * batch.num_tokens

    def num_output(request: Request) -> int:
        return int(min(settings["output"], request.sampling.max_tokens + 1))

    return FakeModel(
        vocab_size=49_152,
        seconds=seconds,
        num_output=num_output,
        writes_kv=bool(settings["verify"]),
        layout=replace(TINY_LAYOUT, num_layers=int(settings["layers"]), num_kv_heads=int(settings["heads"])),
    )


@dataclass(slots=True)
class _Known:
    request: Request
    origin: int  # hash of what determines the answer: prompt and seed
    tokens: list[int]
    hashes: list[int] = field(default_factory=list)  # of tokens[: i + 1], as far as computed

    def hash_until(self, count: int) -> Words:
        """Hashes of the first `count` positions."""
        value = self.hashes[-1] if self.hashes else 0
        for token in self.tokens[len(self.hashes) : count]:
            value = _mix(value ^ (token + 1))
            self.hashes.append(value)
        return np.array(self.hashes[:count], dtype=np.uint64)


class FakeExecutor(Executor):
    """See `base.Executor`. Of `options` it heeds `kv_bytes`, `block_size`, `max_model_len`. Its time is the loop's."""

    def __init__(
        self,
        options: EngineOptions,
        model: FakeModel = FakeModel(),
        *,
        kv_buffer_factory: Callable[[int], bytearray | memoryview] = bytearray,
        verify: bool = False,
    ) -> None:
        given = model.layout
        self.layout = KVLayout(given.num_layers, given.num_kv_heads, given.head_dim, options.block_size, given.dtype)
        self.sharding = model.sharding(options.tp, options.pp)
        self.block_size = options.block_size
        row = self.layout.head_dim * self.layout.itemsize * options.block_size
        need = row * max(len(self._rows(rank)) for rank in range(self.sharding.num_ranks))
        self.num_blocks = options.kv_bytes // need
        if self.num_blocks < 1:
            raise PlanError(f"{options.kv_bytes} bytes of KV memory hold no block ({need} bytes)")
        limit = min(options.max_model_len or model.max_model_len, model.max_model_len)
        self.max_model_len = min(limit, self.num_blocks * options.block_size)
        self.eos_token_ids = model.eos_token_ids
        self._model = model
        self._verify = verify
        self.max_in_flight = options.pp
        self._stages = [0.0] * options.pp  # when each is free, on the loop's clock
        self._buffer_factory = kv_buffer_factory
        self._known: dict[int, _Known] = {}

    async def start(self, progress: Callable[[float, str], None]) -> None:
        layout = self.layout
        assert layout.head_dim * layout.itemsize % 8 == 0
        rows, words = layout.num_layers * 2 * layout.num_kv_heads, layout.head_dim * layout.itemsize // 8
        self.kv_buffers: list[bytearray | memoryview] = []  # of each rank
        self._pools: list[tuple[Words, list[int]]] = []  # the same, and which of the model's rows they hold
        for rank in range(self.sharding.num_ranks):
            held = self._rows(rank)
            shape = (self.num_blocks, len(held), layout.block_size, words)
            self.kv_buffers.append(self._buffer_factory(math.prod(shape) * 8))
            words_of = np.frombuffer(self.kv_buffers[rank], np.uint64, math.prod(shape))
            self._pools.append((words_of.reshape(shape), held))
        self._salt = np.arange(rows * words, dtype=np.uint64).reshape(rows, words) * np.uint64(_GOLDEN)
        progress(1.0, "ready")

    def _rows(self, rank: int) -> list[int]:
        layers, heads, width = self.sharding.layers(rank), self.sharding.heads(rank), self.layout.num_kv_heads
        return [(2 * layer + half) * width + head for layer in layers for half in (0, 1) for head in heads]

    def add(self, request: Request) -> None:
        data = struct.pack(f"<Q{len(request.prompt)}q", request.sampling.seed & _MASK, *request.prompt)
        origin = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
        self._known[request.id] = _Known(request, origin, [*request.prompt, *request.output])

    def launch(self, batch: Batch) -> asyncio.Future[EngineResult]:
        if self._verify:
            for sequence, _ in batch.items:
                self.check(sequence)
        loop = asyncio.get_running_loop()
        done: asyncio.Future[EngineResult] = loop.create_future()
        began = loop.time()
        host, seconds = self._model.host(batch), self._model.seconds(batch)
        end = began + host
        for stage, free in enumerate(self._stages):
            end = self._stages[stage] = max(end, free) + seconds
        if end > began:
            loop.call_at(end, self._end, batch, end - began, done)
        else:
            loop.call_soon(self._end, batch, 0.0, done)
        return done

    def _end(self, batch: Batch, seconds: float, done: asyncio.Future[EngineResult]) -> None:
        if not done.done():  # else nobody waits for it any more
            try:
                done.set_result(self._compute(batch, seconds))
            except (LookupError, KVMismatch) as error:  # the driver forgot it, or gave it too few blocks
                done.set_exception(error)

    def _compute(self, batch: Batch, seconds: float) -> EngineResult:
        result = EngineResult(seconds=seconds)
        for sequence, count in batch.items:
            known = self._known[sequence.id]
            if self._model.writes_kv:
                self._write(sequence, known, sequence.num_computed + count)
            if sequence.num_computed + count == len(known.tokens):
                result.tokens[sequence.id] = self._next_token(known)
        return result

    def check(self, sequence: ScheduledSequence) -> None:
        """Raises `KVMismatch` where the computed part of `sequence` is not what its tokens imply."""
        known, count = self._known[sequence.id], sequence.num_computed
        if sequence.num_tokens != len(known.tokens):
            raise KVMismatch(
                f"sequence {sequence.id}: {sequence.num_tokens} tokens scheduled, {len(known.tokens)} known"
            )
        expected, positions = self._pattern(known, 0, count), np.arange(count)
        blocks = np.array(sequence.blocks, dtype=np.int64)[positions // self.block_size]
        for rank, (pool, rows) in enumerate(self._pools):
            found = pool[blocks, :, positions % self.block_size]  # [positions, rows, words]
            wrong = np.flatnonzero((found != expected[:, rows]).any(axis=(1, 2)))
            if len(wrong):
                where = f"first {wrong[0]}, in block {blocks[wrong[0]]} of rank {rank}"
                raise KVMismatch(f"sequence {sequence.id}: {len(wrong)} of {count} positions are not its KV, {where}")

    def _write(self, sequence: ScheduledSequence, known: _Known, end: int) -> None:
        positions = np.arange(sequence.num_computed, end)
        blocks = np.array(sequence.blocks)[positions // self.block_size]
        pattern = self._pattern(known, sequence.num_computed, end)
        for pool, rows in self._pools:
            pool[blocks, :, positions % self.block_size] = pattern[:, rows]

    def _pattern(self, known: _Known, first: int, end: int) -> Words:
        """[positions, rows, words] that the pool should hold of all layers and heads."""
        return known.hash_until(end)[first:, None, None] ^ self._salt

    def _next_token(self, known: _Known) -> Token:
        """Token number `len(output)` of the answer: a function of prompt, seed and that number alone."""
        request, sampling = known.request, known.request.sampling
        index = len(request.output)
        eos = self._model.eos_token_ids
        finish = None
        if not sampling.ignore_eos and index + 1 >= max(self._model.num_output(request), sampling.min_tokens + 1):
            token, finish = eos[0], FinishReason.STOP
        else:
            ordinary = self._model.vocab_size - 1 - max(eos, default=-1)
            token = self._model.vocab_size - 1 - _mix(known.origin + index) % ordinary
        known.tokens.append(token)
        request.output.append(token)
        if finish is None and token in sampling.stop_token_ids and index >= sampling.min_tokens:
            finish = FinishReason.STOP
        if finish is None and (index + 1 >= sampling.max_tokens or len(known.tokens) >= self.max_model_len):
            finish = FinishReason.LENGTH
        return Token(token, finish, *_logprobs(request, index))

    def forget(self, request_id: int) -> None:
        self._known.pop(request_id, None)

    def export_blocks(self, blocks: Sequence[int]) -> None:
        """Nothing to do: the pool is the buffer."""

    def import_blocks(self, blocks: Sequence[int]) -> None:
        """Nothing to do: the pool is the buffer."""

    async def stop(self) -> None:
        self._known.clear()


def _mix(value: int) -> int:
    """splitmix64's finalizer (Steele et al. 2014)."""
    value = (value + _GOLDEN) & _MASK
    value = (value ^ value >> 30) * 0xBF58_476D_1CE4_E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D0_49BB_1331_11EB & _MASK
    return value ^ value >> 31


def _logprobs(request: Request, index: int) -> tuple[Logprobs | None, tuple[Logprobs | None, ...] | None]:
    """(of the token, of the prompt), where asked for: the token is certain, every other equally unlikely."""
    sampling = request.sampling

    def entry(num_top: int) -> Logprobs:
        return Logprobs(-0.5, 1, tuple((token, -0.5 - token) for token in range(num_top)))

    of_token = None if sampling.logprobs is None else entry(sampling.logprobs)
    if sampling.prompt_logprobs is None or index:
        return of_token, None
    return of_token, (None, *[entry(sampling.prompt_logprobs)] * (len(request.prompt) - 1))
