"""All ranks of an instance in one process, a thread each, with links that are lists: what ranks compute, without what
processes cost. The links that are served with are tested by themselves (`test_collectives.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType

import torch
from tests.engine.support import CPU
from torch import Tensor

from distserve.engine import hub, weights
from distserve.engine.base import EngineResult
from distserve.engine.collectives import Links
from distserve.engine.kv_cache import KVCache, private_buffer
from distserve.engine.layers import StepLayout
from distserve.engine.models.base import Model, build
from distserve.engine.parallel import Place, sharding_of
from distserve.engine.runner import Runner
from distserve.engine.state import RequestState
from distserve.engine.step import StepInput

BLOCK_SIZE = 16
Queue = SimpleQueue[Tensor]
PATIENCE = 60.0  # seconds: a rank that fails must not hang the others for ever


class Meeting:
    """Where the ranks of one stage bring their tensors together."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=PATIENCE)
        self.brought: list[Tensor] = [torch.empty(0)] * size

    def bring(self, index: int, x: Tensor) -> list[Tensor]:
        """Everybody's, in order."""
        self.barrier.wait()
        self.brought[index] = x.clone()
        self.barrier.wait()
        return list(self.brought)


class ThreadLinks:
    """See `collectives.Links`."""

    summer: tuple[int, int] | None = None

    def __init__(self, place: Place, meeting: Meeting, before: Queue, behind: Queue) -> None:
        self.member = place.member
        self._meeting, self._before, self._behind = meeting, before, behind

    def sum_(self, x: Tensor) -> Tensor:
        if self.member.size > 1:
            first, *others = self._meeting.bring(self.member.index, x)
            x.copy_(sum(others, first))
        return x

    def gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        assert x.shape[1] == widths[self.member.index]
        if self.member.size == 1:
            return x
        parts = self._meeting.bring(self.member.index, x)
        return x.new_empty((0, sum(widths))) if self.member.index else torch.cat(parts, 1)

    def send(self, x: Tensor) -> None:
        assert x.dtype == torch.float32
        self._behind.put(x)

    def receive(self, shape: tuple[int, int]) -> Tensor:
        x = self._before.get(timeout=PATIENCE)
        assert x.shape == shape
        return x

    def close(self) -> None:
        """Nothing is open."""


def thread_links(places: Sequence[Place]) -> list[Links]:
    sharding = places[0].sharding
    meetings = [Meeting(sharding.tp) for _ in range(sharding.pp)]
    queues: list[Queue] = [SimpleQueue() for _ in range(sharding.num_ranks + sharding.tp)]
    links: list[Links] = []
    for place in places:
        links.append(ThreadLinks(place, meetings[place.stage], queues[place.rank], queues[place.rank + sharding.tp]))
    return links


def all_places(path: Path, tp: int, pp: int) -> list[Place]:
    sharding = sharding_of(hub.read_spec(path), tp, pp)
    return [Place(sharding, rank) for rank in range(tp * pp)]


class Ranks:
    """Some ranks of an instance, usually all, that compute the checkpoint at `path`."""

    def __init__(
        self,
        path: Path,
        ranks: Iterable[tuple[Place, Links]],
        dtype: torch.dtype = torch.float32,
        num_blocks: int = 40,
    ) -> None:
        self.spec = spec = hub.read_spec(path)
        self.models: list[Model] = []
        self.runners: list[Runner] = []
        self.kvs: list[KVCache] = []
        for place, links in ranks:
            with torch.inference_mode():
                model = build(spec, dtype, place, links)
                weights.load(path, model, CPU)
                model.finish(spec.max_model_len, CPU)
            layout = place.kv_layout(spec, BLOCK_SIZE, str(dtype).removeprefix("torch."))
            kv = KVCache(layout, num_blocks, private_buffer(num_blocks * layout.block_bytes), CPU)
            self.models.append(model)
            self.kvs.append(kv)
            self.runners.append(Runner(model, kv, spec.max_model_len, CPU))
        self._threads = ThreadPoolExecutor(len(self.models))

    @classmethod
    def all(cls, path: Path, tp: int, pp: int, dtype: torch.dtype = torch.float32) -> Ranks:
        places = all_places(path, tp, pp)
        return cls(path, zip(places, thread_links(places), strict=True), dtype)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._threads.shutdown()

    def run(self, step: StepInput, states: dict[int, RequestState]) -> EngineResult:
        """What the rank that samples answers; the others answer nothing."""
        futures = []
        for model, runner in zip(self.models, self.runners, strict=True):
            known = states if model.place.samples else {}
            futures.append(self._threads.submit(runner.run, step, known))
        results = [future.result(PATIENCE) for future in futures]
        answers = [r for r, model in zip(results, self.models, strict=True) if model.place.samples]
        assert sum(bool(result.tokens) for result in results) <= 1
        return answers[0]

    def logits(self, ids: Sequence[int], context: int = 0) -> Tensor:
        """[T, V] of the tokens `ids` of one sequence, which follow `context` tokens that were computed before; no rows
        where the rank at which logits come together is not among these."""
        blocks = list(range(-(-(context + len(ids)) // BLOCK_SIZE)))
        step = StepLayout.build([len(ids)], [context + len(ids)], [blocks], BLOCK_SIZE)
        tokens = torch.tensor(ids, dtype=torch.int32)
        futures = [
            self._threads.submit(_logits, model, tokens, step, kv)
            for model, kv in zip(self.models, self.kvs, strict=True)
        ]
        found = [future.result(PATIENCE) for future in futures]
        return next((logits for logits in found if len(logits)), found[0])


def _logits(model: Model, ids: Tensor, step: StepLayout, kv: KVCache) -> Tensor:
    with torch.inference_mode():
        if model.place.is_first:
            residual = model.embed(ids, step)
        else:
            residual = model.links.receive((len(ids), model.spec.hidden_size))
        residual = model.blocks(residual, step, kv.layers, None)
        if model.place.is_last:
            return model.logits(model.final(residual))
        model.links.send(residual)
        return residual[:0]
