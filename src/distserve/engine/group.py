"""The executor of an instance of several ranks: one process each, told what to compute by this one, which computes
nothing and knows no tensor.

    launch(batch) -> StepInput --the same to every rank--> rank 0 .. N-1        (stages of a pipeline work at once)
    result        <------------- Computed --------------- the rank that samples

The requests' tokens are kept here, where batches become steps, and where they are sampled. Ranks are one thing: when
one of them ends, or says that it cannot go on, all are ended and the executor is broken for good.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from distserve.engine import hub
from distserve.engine.base import EngineOptions, EngineResult, Executor
from distserve.engine.messages import Begin, Begun, Computed, Failed, Progress, Stage, Step, decode_to_driver, encode
from distserve.engine.parallel import Place, sharding_of
from distserve.engine.state import RequestState
from distserve.engine.step import plan_step
from distserve.errors import DistserveError, InstanceGone, PlanError, UsageError
from distserve.line import Line, WaitingLine, adopt
from distserve.request import Request
from distserve.sched.base import Batch
from distserve.sharding import Sharding
from distserve.specs import KVLayout

log = logging.getLogger(__name__)


class RankProcess(Protocol):
    """A process that waits on its end of a socket to be told which rank it is."""

    pid: int
    end: socket.socket  # this process's end
    side: socket.socket  # and that of a second socket, for staging KV

    def kill(self) -> None: ...

    def wait(self) -> int:
        """For its end; returns its exit status, negative: the signal that killed it. Idempotent."""
        ...


@dataclass(slots=True)
class _Flight:
    batch: Batch
    launched: float
    done: asyncio.Future[EngineResult]


class GroupExecutor(Executor):
    """See `base.Executor`. `options.ranks` says where each rank runs; `processes` are as many; `allocate` makes memory
    of so many bytes and says where a rank finds it. The fields below are set when `start` returns."""

    layout: KVLayout  # of the whole model
    sharding: Sharding
    num_blocks: int
    max_model_len: int

    def __init__(
        self,
        options: EngineOptions,
        processes: Sequence[RankProcess],
        allocate: Callable[[int], str],
        rendezvous: Path,
        *,
        name: str = "instance",
        log_level: str = "info",
    ) -> None:
        assert len(processes) == len(options.ranks) == options.tp * options.pp
        self.block_size = options.block_size
        self.max_in_flight = options.pp
        self._options = options
        self._processes = processes
        self._allocate = allocate
        self._rendezvous = rendezvous
        self._name, self._log_level = name, log_level
        self._lines: list[Line] = []
        self._sides = [WaitingLine(process.side) for process in processes]
        self._staging = threading.Lock()
        self._progress = [(0.0, "starting")] * len(processes)
        self._tell: Callable[[float, str], None] = lambda fraction, what: None
        self._num_begun = 0
        self._begun: asyncio.Future[None] | None = None
        self._error: DistserveError | None = None  # why nothing can be computed any more
        self._on_broken: Callable[[DistserveError], None] | None = None
        self._stopping = False
        self._states: dict[int, RequestState] = {}
        self._added: dict[int, Request] = {}  # the rank that samples does not know of them yet
        self._forgotten: list[int] = []
        self._flights: deque[_Flight] = deque()
        self._landed = 0.0

    # -- its life -----------------------------------------------------------------------------------------------------

    async def start(self, progress: Callable[[float, str], None]) -> None:
        """Raises what a rank could not be started for."""
        options, loop = self._options, asyncio.get_running_loop()
        spec = hub.read_spec(Path(options.model))
        dtype = spec.dtype if options.dtype == "auto" else options.dtype
        self.sharding = sharding_of(spec, options.tp, options.pp)
        self.layout = spec.kv_layout(options.block_size, dtype)
        places = [Place(self.sharding, rank) for rank in range(self.sharding.num_ranks)]
        sizes = [place.kv_layout(spec, options.block_size, dtype).block_bytes for place in places]
        self.num_blocks = options.kv_bytes // max(sizes)
        if self.num_blocks < 1:
            raise PlanError(
                f"{options.kv_bytes} bytes of KV memory hold no block of {options.block_size} tokens "
                f"({max(sizes)} bytes a rank); give more KV memory or smaller blocks"
            )
        context = options.max_model_len or spec.max_model_len
        self.max_model_len = min(context, self.num_blocks * options.block_size)
        self._vocab_size, self._eos_token_ids = spec.vocab_size, spec.eos_token_ids
        self._sampler = next(place.rank for place in places if place.samples)
        self._tell, self._begun = progress, loop.create_future()
        for rank, process in enumerate(self._processes):
            self._lines.append(await adopt(process.end, partial(self._receive, rank), partial(self._lost, rank)))
            begin = Begin(
                name=self._name,
                rank=rank,
                sharding=self.sharding,
                options=options.of_rank(rank),
                num_blocks=self.num_blocks,
                memory=self._allocate(self.num_blocks * sizes[rank]),
                rendezvous=str(self._rendezvous),
                log_level=self._log_level,
            )
            self._lines[rank].send(encode(begin))
        await self._begun
        self._rendezvous.unlink(missing_ok=True)  # they have met
        progress(1.0, "ready")

    async def stop(self) -> None:
        """A rank holds nothing that must be put in order."""
        self._stopping = True
        self._end_ranks()
        for line in self._lines:
            line.close()
        for side in self._sides:
            side.close()
        self._fail(InstanceGone("the instance stops"))
        self._states.clear()

    def on_broken(self, tell: Callable[[DistserveError], None]) -> None:
        self._on_broken = tell

    def _end_ranks(self) -> list[int]:
        """Kills all that are left; returns the status that each ended with."""
        for process in self._processes:
            process.kill()
        return [process.wait() for process in self._processes]

    # -- computing ----------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Takes ownership of `request`; its `output` grows. Raises `RequestError` where it names unknown tokens."""
        self._states[request.id] = RequestState(request, self._vocab_size, self._eos_token_ids)
        self._added[request.id] = request

    def forget(self, request_id: int) -> None:
        if self._states.pop(request_id, None) is not None and self._added.pop(request_id, None) is None:
            self._forgotten.append(request_id)

    def launch(self, batch: Batch) -> asyncio.Future[EngineResult]:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[EngineResult] = loop.create_future()
        if self._error is not None:
            done.set_exception(self._error)
            return done
        self._flights.append(_Flight(batch, loop.time(), done))
        step = plan_step(batch, self._states)
        message = encode(Step(step))
        for rank, line in enumerate(self._lines):
            news = rank == self._sampler and (self._added or self._forgotten)
            try:
                line.send(encode(Step(step, self._forgotten, [*self._added.values()])) if news else message)
            except ConnectionError:
                self._lost(rank)
                return done
        self._added.clear()
        self._forgotten.clear()
        return done

    def export_blocks(self, blocks: list[int]) -> None:
        """Before others read `blocks` of the ranks' memory. From any thread; returns when all ranks have done it."""
        self._stage(Stage(blocks, to_device=False))

    def import_blocks(self, blocks: list[int]) -> None:
        """After `blocks` were written in the ranks' memory, in the same way."""
        self._stage(Stage(blocks, to_device=True))

    def _stage(self, stage: Stage) -> None:
        if self._options.device == "cpu":
            return  # a rank's KV lies in that memory
        with self._staging:
            for side in self._sides:
                side.send(encode(stage))
            for rank, side in enumerate(self._sides):
                if side.receive() is None:
                    raise InstanceGone(f"rank {rank} is gone")

    def _computed(self, result: EngineResult) -> None:
        flight = self._flights.popleft()
        now = flight.done.get_loop().time()
        # In a full pipeline a batch takes as long as it keeps the one behind it waiting.
        result.seconds = now - max(flight.launched, self._landed)
        self._landed = now
        for request_id, token in result.tokens.items():
            self._states[request_id].append(token.id)
        if not flight.done.done():  # else nobody waits for it any more
            flight.done.set_result(result)

    # -- what the ranks say -------------------------------------------------------------------------------------------

    def _receive(self, rank: int, data: bytes) -> None:
        match decode_to_driver(data):
            case Computed(result=result):
                self._computed(result)
            case Progress(fraction=fraction, what=what):
                self._progress[rank] = fraction, what
                self._tell(*min(self._progress))
            case Begun():
                self._progress[rank] = 1.0, "ready"
                self._num_begun += 1
                if self._num_begun == len(self._lines) and self._begun is not None and not self._begun.done():
                    self._begun.set_result(None)
            case Failed(text=text, usage=usage):
                self._break(UsageError(text) if usage else InstanceGone(f"rank {rank} fails: {text}"))

    def _lost(self, rank: int) -> None:
        if self._stopping or self._error is not None:
            return
        process = self._processes[rank]
        status = self._end_ranks()[rank]
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        self._break(InstanceGone(f"rank {rank} (process {process.pid}) {how}"))

    def _break(self, error: DistserveError) -> None:
        """For good: what the other ranks compute is worth nothing without this one."""
        if self._error is not None:
            return
        self._error = error
        self._end_ranks()
        self._fail(error)
        if self._on_broken is not None:
            self._on_broken(error)

    def _fail(self, error: DistserveError) -> None:
        """Everything that somebody waits for."""
        if self._begun is not None and not self._begun.done():
            self._begun.set_exception(error)
        flights, self._flights = self._flights, deque()
        for flight in flights:
            if not flight.done.done():
                flight.done.set_exception(error)
                flight.done.exception()  # whoever does not look at it any more may leave it
