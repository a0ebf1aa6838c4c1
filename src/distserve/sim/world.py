"""What is around the instances: arrivals, routing, hand-offs, pulls. The counterpart of `serve/gateway.py`; which
instance a request goes to is the router's choice, in both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distserve.cluster import Cluster
from distserve.costs.base import Costs, Engine
from distserve.costs.memory import kv_token_bytes
from distserve.costs.network import Links, Route
from distserve.costs.seats import devices_spanned, seat
from distserve.errors import RequestError
from distserve.plan import Plan, Replica, Role
from distserve.sched.blocks import BlockCount
from distserve.sched.policy import AdmissionPolicy, ColocatedPolicy, DecodePolicy, PrefillPolicy
from distserve.sched.roles import Policies, scheduler_for
from distserve.sched.router import Candidate, Router
from distserve.sim.events import Events
from distserve.sim.instance import Instance, Trace
from distserve.sim.life import NEVER, Imagined, Life
from distserve.sim.pulls import Pulls

WHOLE = 1 << 20  # tokens; as many as a sequence may have


@dataclass(slots=True)
class _Member:
    """An instance and what the world remembers of it."""

    instance: Instance
    tokens_per_second: float


class World:
    """All instances of a plan. `run` lives a workload in it, once."""

    def __init__(
        self,
        plan: Plan,
        costs: Costs,
        *,
        cluster: Cluster | None = None,
        admission: AdmissionPolicy | None = None,
        trace: Trace | None = None,
    ) -> None:
        self.events = Events()
        self._costs = costs
        self._engine = costs.engine
        self._router = Router(admission)
        self._first: dict[str, _Member] = {}  # prefill and colocated
        self._decode: dict[str, _Member] = {}
        self._sources: dict[int, Instance] = {}  # sequence id: where its KV is held
        self._num_live = 0
        self._live_tokens = 0  # of prompts and answers
        self._mean_seconds = 1.0
        self._stop: Callable[[Life], bool] | None = None
        self._stopped = False
        self._token_bytes = kv_token_bytes(costs.spec, dtype=costs.dtype)
        cluster = cluster or costs.assumed_cluster(devices_spanned(plan))
        seating = seat(plan, cluster)
        self._links = Links(cluster)
        self._pulls = Pulls(self._links, self.events)
        self._seats = seating.seats
        self._routes: dict[tuple[str, str], Route] = {}
        pulls = any(spec.role is Role.DECODE for spec in plan.instances) and not self._engine.pull_bandwidth
        self._notes = list(seating.notes) if pulls else []
        num_decode = sum(spec.count for spec in plan.instances if spec.role is Role.DECODE)
        num_first = sum(spec.count for spec in plan.instances) - num_decode
        for replica in plan.replicas():
            choice = (num_decode if replica.role is Role.DECODE else num_first) > 1
            member = self._member(replica, choice)
            member.instance.trace = trace
            (self._decode if replica.role is Role.DECODE else self._first)[replica.name] = member
        # Where there is no choice, nobody need be asked: it would cost more than the rest of a request's simulation.
        self._only_first = next(iter(self._first)) if len(self._first) == 1 else None
        self._only_decode = next(iter(self._decode)) if len(self._decode) == 1 else None
        policy, slowest = self._router.policy, min(member.tokens_per_second for member in self._first.values())
        self._surely_admitted = min(policy.max_queued_tokens, policy.max_wait * slowest)

    @property
    def instances(self) -> list[Instance]:
        return [member.instance for member in (*self._first.values(), *self._decode.values())]

    def run(self, lives: Sequence[Life], stop: Callable[[Life], bool] | None = None) -> float:
        """Lives all of them; returns when the last was over. `stop`, asked as each ends, ends the world early."""
        events, delay = self.events, self._engine.request
        self._stop = stop
        stopped = None if stop is None else lambda: self._stopped
        now = 0.0
        for life in lives:
            time = life.arrival + delay
            now = events.run(time, stopped) or now
            if self._stopped:
                return now
            self._arrive(life, time)
        return events.run(NEVER, stopped) or now

    def notes(self) -> tuple[str, ...]:
        """What a reader of the result should know."""
        usage = [instance.usage for instance in self.instances]
        ranges = self._costs.notes(
            max(use.prompt_tokens for use in usage), max(use.batch for use in usage), max(use.context for use in usage)
        )
        return (*self._notes, *ranges)

    # -- a request's way ----------------------------------------------------------------------------------------------

    def _arrive(self, life: Life, now: float) -> None:
        tokens = life.prompt_tokens
        if not self._admits(tokens, now):
            life.status = "refused"
            return
        name = self._only_first or self._router.pick_prefill(tokens, self._candidates(self._first, now))
        assert name is not None, "a plan has somebody who reads prompts"
        try:
            self._first[name].instance.add(Imagined(life, tokens), now)
        except RequestError:
            life.status = "refused"
            return
        self._num_live += 1
        self._live_tokens += tokens + life.output_tokens

    def _admits(self, tokens: int, now: float) -> bool:
        policy = self._router.policy
        live = self._live_tokens + tokens  # no queue holds more
        if self._num_live < policy.max_requests and live <= self._surely_admitted:
            return True
        admission = self._router.admit(
            tokens,
            self._candidates(self._first, now),
            num_requests=self._num_live,
            mean_seconds=self._mean_seconds,
        )
        return admission.retry_after is None

    def held(self, instance: Instance, sequence: Imagined, now: float) -> None:
        """A prompt is computed, and its first token is out; its KV waits for a puller."""
        name = self._only_decode or self._router.pick_decode(sequence.num_tokens, self._candidates(self._decode, now))
        assert name is not None, "a plan with prefill instances has decode instances"
        self._sources[sequence.id] = instance
        follower = Imagined(sequence.life, sequence.num_tokens, num_kv_tokens=sequence.num_computed)
        try:
            self._decode[name].instance.add(follower, now)
        except RequestError:
            sequence.life.status = "refused"
            self._over(sequence.life)
            self._release(sequence.id, now)

    def start_pull(self, instance: Instance, sequence: Imagined, now: float) -> float:
        engine = self._engine
        size = sequence.num_kv_tokens * self._token_bytes
        if engine.pull_bandwidth:
            seconds = engine.pull + size / engine.pull_bandwidth
            self.events.at(now + seconds, self._pulled, (instance, sequence))
            return seconds
        route = self._route(self._sources[sequence.id].name, instance.name)
        self._pulls.start(route, size, now + engine.pull, lambda when: self._pulled(when, (instance, sequence)))
        return engine.pull + self._links.seconds(route, size)

    def _pulled(self, now: float, pull: tuple[Instance, Imagined]) -> None:
        instance, sequence = pull
        sequence.life.pulled = now
        instance.pull_ended(sequence, now)
        self._release(sequence.id, now)

    def _release(self, sequence_id: int, now: float) -> None:
        source = self._sources.pop(sequence_id)
        source.scheduler.release(sequence_id, now)  # type: ignore[attr-defined]  # only prefill holds
        source.look(now)

    def finished(self, sequence: Imagined, now: float) -> None:
        life = sequence.life
        life.last = now
        self._over(life)
        self._mean_seconds += 0.1 * (now - life.arrival - self._mean_seconds)
        if self._stop is not None and self._stop(life):
            self._stopped = True

    def _over(self, life: Life) -> None:
        self._num_live -= 1
        self._live_tokens -= life.prompt_tokens + life.output_tokens

    # -- parts --------------------------------------------------------------------------------------------------------

    def _candidates(self, members: dict[str, _Member], now: float) -> list[Candidate]:
        return [
            Candidate(name, member.instance.load(now), member.tokens_per_second) for name, member in members.items()
        ]

    def _route(self, source: str, target: str) -> Route:
        route = self._routes.get((source, target))
        if route is None:
            route = self._links.route(self._costs.spec, self._seats[source], self._seats[target])
            self._routes[source, target] = route
        return route

    def _member(self, replica: Replica, choice: bool) -> _Member:
        spec, engine = replica.spec, self._engine
        latency = self._costs.latency(spec.tp, spec.pp)
        pool = BlockCount(self._costs.kv_blocks(spec.tp, spec.pp, spec.kv_memory), engine.block_size)
        knee = latency.knee()
        scheduler = scheduler_for(
            replica.role,
            pool,
            policies(engine, knee),
            policy=spec.policy or "chunked",
            batch_tokens=spec.chunk_tokens or spec.max_batch_tokens,
            max_in_flight=spec.pp,
        )
        token_bytes = self._token_bytes / spec.num_ranks
        instance = Instance(
            replica.name,
            replica.role,
            scheduler,
            latency,
            engine,
            self.events,
            self,
            token_bytes=token_bytes,
            reports=choice,
        )
        return _Member(instance, knee / latency.prompts([knee]))


def policies(engine: Engine, knee: int) -> Policies:
    """How `engine` batches where a plan does not say, on an instance whose knee is `knee` tokens."""
    return Policies(
        PrefillPolicy(max_batch_tokens=engine.prefill_batch_tokens or knee, max_batch_size=engine.prefill_batch_size),
        DecodePolicy(
            max_batch_size=engine.decode_batch_size,
            chunk_tokens=WHOLE if engine.swap_bandwidth else DecodePolicy().chunk_tokens,
            watermark_blocks=engine.watermark_blocks,
            micro_batches=engine.micro_batches,
        ),
        ColocatedPolicy(
            max_batch_size=engine.decode_batch_size,
            chunk_tokens=max(engine.chunk_tokens or knee, engine.decode_batch_size),
            max_batch_tokens=engine.colocated_batch_tokens or knee,
            watermark_blocks=engine.watermark_blocks,
        ),
    )
