"""What is around the instances: arrivals, routing, hand-offs, pulls. The counterpart of `serve/gateway.py`; the choice of
an instance is the router's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distserve.costs.base import Costs
from distserve.errors import RequestError
from distserve.plan import Plan, Replica, Role
from distserve.sched.blocks import BlockPool
from distserve.sched.policy import AdmissionPolicy, ColocatedPolicy, DecodePolicy, PrefillPolicy
from distserve.sched.roles import Policies, scheduler_for
from distserve.sched.router import Candidate, Router
from distserve.sim.events import Events
from distserve.sim.instance import Instance, Trace
from distserve.sim.life import NEVER, Imagined, Life

PullSeconds = Callable[[str, str, int], float]  # (source, target, bytes): an uncontended pull


@dataclass(slots=True)
class _Member:
    """An instance and what the cluster remembers of it."""

    instance: Instance
    tokens_per_second: float


class Cluster:
    """All instances of a plan in one imagined world."""

    def __init__(self, plan: Plan, costs: Costs, *, admission: AdmissionPolicy | None = None, trace: Trace | None = None) -> None:
        self.events = Events()
        self._costs = costs
        self._engine = costs.engine
        self._router = Router(admission)
        self._first: dict[str, _Member] = {}  # prefill and colocated
        self._decode: dict[str, _Member] = {}
        self._sources: dict[int, Instance] = {}  # sequence id: where its KV is held
        self._num_live = 0
        self._mean_seconds = 1.0
        for replica in plan.replicas():
            member = self._member(replica)
            member.instance.trace = trace
            (self._decode if replica.role is Role.DECODE else self._first)[replica.name] = member

    @property
    def instances(self) -> list[Instance]:
        return [member.instance for member in (*self._first.values(), *self._decode.values())]

    def run(self, lives: Sequence[Life], stop: Callable[[Life], bool] | None = None) -> float:
        """Lives all of them; returns when the last was over. `stop`, asked as each ends, ends the world early."""
        events, delay = self.events, self._engine.request
        self._stop, self._stopped = stop, False
        now = 0.0
        for life in lives:
            time = life.arrival + delay
            while events.next_time <= time and not self._stopped:
                now = events.step()
            if self._stopped:
                return now
            now = time
            self._arrive(life, now)
        while events.next_time < NEVER and not self._stopped:
            now = events.step()
        return now

    # -- a request's way ------------------------------------------------------------------------------------------------

    def _arrive(self, life: Life, now: float) -> None:
        candidates = self._candidates(self._first, now)
        admission = self._router.admit(
            life.prompt_tokens, candidates, num_requests=self._num_live, mean_seconds=self._mean_seconds
        )
        if admission.retry_after is not None:
            life.status = "refused"
            return
        name = self._router.pick_prefill(life.prompt_tokens, candidates)
        assert name is not None
        sequence = Imagined(
            life.index, life.prompt_tokens, target=life.prompt_tokens + life.output_tokens, life=life
        )
        try:
            self._first[name].instance.add(sequence, now)
        except RequestError:
            life.status = "refused"
            return
        self._num_live += 1

    def first_token(self, instance: Instance, sequence: Imagined, held: bool, now: float) -> None:
        if not held:
            return
        tokens = sequence.num_tokens
        name = self._router.pick_decode(tokens, self._candidates(self._decode, now))
        assert name is not None
        self._sources[sequence.id] = instance
        follower = Imagined(
            sequence.id, tokens, num_kv_tokens=sequence.num_computed, target=sequence.target, life=sequence.life
        )
        try:
            self._decode[name].instance.add(follower, now)
        except RequestError:
            assert sequence.life is not None
            sequence.life.status = "refused"
            self._release(sequence.id, now)
            self._num_live -= 1

    def start_pull(self, instance: Instance, sequence: Imagined, now: float) -> float:
        engine = self._engine
        size = sequence.num_kv_tokens * self._costs.spec.kv_layout(1, "float16").token_bytes
        seconds = engine.pull + size / (engine.pull_bandwidth or 1e12)
        self.events.at(now + seconds, self._pulled, (instance, sequence))
        return seconds

    def _pulled(self, now: float, pull: tuple[Instance, Imagined]) -> None:
        instance, sequence = pull
        assert sequence.life is not None
        sequence.life.pulled = now
        instance.pull_ended(sequence, now)
        self._release(sequence.id, now)

    def _release(self, sequence_id: int, now: float) -> None:
        source = self._sources.pop(sequence_id)
        source.scheduler.release(sequence_id, now)  # type: ignore[attr-defined]  # only prefill holds
        source.look(now)

    def finished(self, sequence: Imagined, now: float) -> None:
        life = sequence.life
        assert life is not None
        life.last = now
        self._num_live -= 1
        self._mean_seconds += 0.1 * (now - life.arrival - self._mean_seconds)
        if self._stop is not None and self._stop(life):
            self._stopped = True

    # -- parts ----------------------------------------------------------------------------------------------------------

    def _candidates(self, members: dict[str, _Member], now: float) -> list[Candidate]:
        return [
            Candidate(name, member.instance.load(now), member.tokens_per_second) for name, member in members.items()
        ]

    def _member(self, replica: Replica) -> _Member:
        spec, engine, costs = replica.spec, self._engine, self._costs
        latency = costs.latency(spec.tp, spec.pp)
        pool = BlockPool(costs.kv_blocks(spec.tp, spec.pp), engine.block_size)
        knee = engine.prefill_batch_tokens or 2048
        policies = Policies(
            PrefillPolicy(max_batch_tokens=knee, max_batch_size=engine.prefill_batch_size),
            DecodePolicy(
                max_batch_size=engine.decode_batch_size,
                chunk_tokens=1 << 20 if engine.swap_bandwidth else 512,
                watermark_blocks=engine.watermark_blocks,
                micro_batches=engine.micro_batches,  # type: ignore[arg-type]
            ),
            ColocatedPolicy(
                max_batch_size=engine.decode_batch_size,
                chunk_tokens=max(512, engine.decode_batch_size),
                max_batch_tokens=engine.colocated_batch_tokens or knee,
                watermark_blocks=engine.watermark_blocks,
            ),
        )
        scheduler = scheduler_for(
            replica.role,
            pool,
            policies,
            policy=spec.policy or "chunked",
            batch_tokens=spec.chunk_tokens or spec.max_batch_tokens,
            max_in_flight=spec.pp,
        )
        token_bytes = costs.spec.kv_layout(1, "float16").token_bytes / (spec.tp * spec.pp)
        instance = Instance(replica.name, replica.role, scheduler, latency, engine, self.events, self, token_bytes=token_bytes)
        return _Member(instance, knee / latency.prompts([knee]))
