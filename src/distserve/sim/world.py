"""What is around the instances: arrivals, routing, hand-offs, pulls. The counterpart of `serve/gateway.py`; which
instance a request goes to is the router's choice, in both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from distserve.cluster import Cluster, node_of
from distserve.costs import base
from distserve.costs.base import Costs, Engine, Neighbour
from distserve.costs.memory import kv_token_bytes
from distserve.costs.network import Links
from distserve.costs.seats import devices_spanned, seat
from distserve.errors import RequestError
from distserve.plan import Plan, Replica, Role
from distserve.sched.blocks import BlockCount
from distserve.sched.policy import AdmissionPolicy, ColocatedPolicy, DecodePolicy, PrefillPolicy
from distserve.sched.roles import Policies, scheduler_for
from distserve.sched.router import Candidate, Router
from distserve.sim.events import Event, Events
from distserve.sim.instance import Instance, Surroundings, Trace
from distserve.sim.life import NEVER, Imagined, Life
from distserve.sim.pulls import Pull, Pulls, Way
from distserve.sim.weather import Weather

WHOLE: Final = 1 << 20  # tokens; as many as a sequence may have
GOLDEN: Final = (5**0.5 - 1) / 2  # multiples of it, less their whole parts, lie far apart however many there are


class _Member:
    """An instance and what the world remembers of it."""

    __slots__ = ("candidate", "instance", "tokens_per_second", "ways")

    def __init__(self, instance: Instance, tokens_per_second: float) -> None:
        self.instance = instance
        self.tokens_per_second = tokens_per_second
        self.candidate = Candidate(instance.name, instance.load(0.0), tokens_per_second)
        self.ways: dict[str, Way] = {}  # by the name of the instance that pulls


class _Pulled(Event):
    """The KV of a sequence has arrived, after a time that nothing else could change."""

    __slots__ = ("instance", "sequence", "world")

    def __init__(self, world: World, instance: Instance, sequence: Imagined) -> None:
        super().__init__()
        self.world = world
        self.instance = instance
        self.sequence = sequence

    def happen(self, now: float) -> None:
        self.world.pulled(self.instance, self.sequence, now)


class _SharedPull(Pull):
    """The same over links that others use, too."""

    __slots__ = ("instance", "sequence", "world")

    def __init__(self, world: World, instance: Instance, sequence: Imagined, way: Way, size: float) -> None:
        super().__init__(way, size)
        self.world = world
        self.instance = instance
        self.sequence = sequence

    def done(self, now: float) -> None:
        self.world.pulled(self.instance, self.sequence, now)


class World(Surroundings):
    """All instances of a plan. `run` lives a workload in it, once."""

    def __init__(
        self,
        plan: Plan,
        costs: Costs,
        *,
        cluster: Cluster | None = None,
        admission: AdmissionPolicy | None = None,
        trace: Trace | None = None,
        weather: Mapping[str, base.Weather] | None = None,
        weather_at: float = 0.0,
    ) -> None:
        self.events = Events()
        self._costs = costs
        self._engine = costs.engine
        self._router = Router(admission)
        self._first: dict[str, _Member] = {}  # prefill and colocated
        self._decode: dict[str, _Member] = {}
        self._sources: list[_Member | None] = []  # by sequence id: where its KV is held
        self._num_live = 0
        self._live_tokens = 0  # of prompts and answers
        self._mean_seconds = 1.0
        self._stop: Callable[[Life], bool] | None = None
        self._token_bytes = kv_token_bytes(costs.spec, dtype=costs.dtype)
        cluster = cluster or costs.assumed_cluster(devices_spanned(plan))
        seating = seat(plan, cluster)
        self._links = Links(cluster)
        self._pulls = Pulls(self._links, self.events)
        self._seats = seating.seats
        self._pull_bandwidth: float = self._engine.pull_bandwidth or 0.0
        self._pull_seconds: float = self._engine.pull
        self._pulls_stall: bool = self._engine.pulls_stall
        pulls = any(spec.role is Role.DECODE for spec in plan.instances) and not self._engine.pull_bandwidth
        self._notes = list(seating.notes) if pulls else []
        num_decode = sum(spec.count for spec in plan.instances if spec.role is Role.DECODE)
        num_first = sum(spec.count for spec in plan.instances) - num_decode
        for replica in plan.replicas():
            choice = (num_decode if replica.role is Role.DECODE else num_first) > 1
            member = self._member(replica, choice)
            member.instance.trace = trace
            (self._decode if replica.role is Role.DECODE else self._first)[replica.name] = member
        slowed = self._engine.prefill_beside != Neighbour() or self._engine.decode_beside != Neighbour()
        if slowed and weather is None:
            self._introduce()
        self._expose(weather, weather_at)
        # Where there is no choice, nobody need be asked: it would cost more than the rest of a request's simulation.
        self._only_first = next(iter(self._first.values())) if len(self._first) == 1 else None
        self._only_decode = next(iter(self._decode.values())) if len(self._decode) == 1 else None
        # The least of all waits is at most what waits for all, over the speed of all.
        policy, speed = self._router.policy, sum([member.tokens_per_second for member in self._first.values()], 0.0)
        self._max_requests: int = policy.max_requests
        self._surely_admitted: float = min(policy.max_queued_tokens, policy.max_wait * speed)

    @property
    def instances(self) -> list[Instance]:
        return [member.instance for member in (*self._first.values(), *self._decode.values())]

    def run(self, lives: list[Life], stop: Callable[[Life], bool] | None = None) -> float:
        """Lives all of them; returns when the last was over. `stop`, asked as each ends, ends the world early."""
        events, delay = self.events, float(self._engine.request)
        self._stop = stop
        self._sources = [None] * len(lives)
        for life in lives:
            time = life.arrival + delay
            events.run(time)
            if events.stopped:
                return events.now
            self._arrive(life, time)
        events.run(NEVER)
        return events.now

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
        member = self._only_first
        if member is None:
            name = self._router.pick_prefill(tokens, self._candidates(self._first, now))
            assert name is not None, "a plan has somebody who reads prompts"
            member = self._first[name]
        try:
            member.instance.add(Imagined(life, tokens), now)
        except RequestError:
            life.status = "refused"
            return
        self._num_live += 1
        self._live_tokens += tokens + life.output_tokens

    def _admits(self, tokens: int, now: float) -> bool:
        live = self._live_tokens + tokens  # no queue holds more
        if self._num_live < self._max_requests and live <= self._surely_admitted:
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
        member = self._only_decode
        if member is None:
            name = self._router.pick_decode(sequence.num_tokens, self._candidates(self._decode, now))
            assert name is not None, "a plan with prefill instances has decode instances"
            member = self._decode[name]
        self._sources[sequence.id] = self._only_first or self._first[instance.name]
        follower = Imagined(sequence.life, sequence.num_tokens, sequence.num_computed)
        try:
            member.instance.add(follower, now)
        except RequestError:
            sequence.life.status = "refused"
            self._over(sequence.life)
            self._release(sequence.id, now)

    def start_pull(self, instance: Instance, sequence: Imagined, now: float) -> float:
        size = sequence.num_kv_tokens * self._token_bytes
        if self._pull_bandwidth:
            seconds = self._pull_seconds + size / self._pull_bandwidth
            self.events.at(now + seconds, _Pulled(self, instance, sequence))
            return seconds
        source = self._sources[sequence.id]
        assert source is not None, "what is pulled is held somewhere"
        way = source.ways.get(instance.name)
        if way is None:
            way = source.ways[instance.name] = self._way(source.instance.name, instance.name)
        self._pulls.start(_SharedPull(self, instance, sequence, way, size), now + self._pull_seconds)
        return self._pull_seconds + self._links.seconds(way.route, size) if self._pulls_stall else 0.0

    def pulled(self, instance: Instance, sequence: Imagined, now: float) -> None:
        sequence.life.pulled = now
        instance.pull_ended(sequence, now)
        self._release(sequence.id, now)

    def _release(self, sequence_id: int, now: float) -> None:
        source = self._sources[sequence_id]
        assert source is not None, "what is released is held somewhere"
        self._sources[sequence_id] = None
        source.instance.release(sequence_id, now)

    def finished(self, sequence: Imagined, now: float) -> None:
        life = sequence.life
        life.last = now
        self._over(life)
        self._mean_seconds += 0.1 * (now - life.arrival - self._mean_seconds)
        if self._stop is not None and self._stop(life):
            self.events.stopped = True

    def _over(self, life: Life) -> None:
        self._num_live -= 1
        self._live_tokens -= life.prompt_tokens + life.output_tokens

    # -- parts --------------------------------------------------------------------------------------------------------

    def _candidates(self, members: dict[str, _Member], now: float) -> list[Candidate]:
        found: list[Candidate] = []
        for name, member in members.items():
            load = member.instance.load(now)
            if load is not member.candidate.load:
                member.candidate = Candidate(name, load, member.tokens_per_second)
            found.append(member.candidate)
        return found

    def _introduce(self) -> None:
        """Instances on one node slow each other down."""
        for one in self.instances:
            for other in self.instances:
                nodes = [node_of(self._seats[each.name].devices[0]) for each in (one, other)]
                if one is not other and nodes[0] == nodes[1]:
                    one.meet(other)

    def _expose(self, weather: Mapping[str, base.Weather] | None, at: float) -> None:
        """Each instance to its own weather, or to what its costs have seen: not all to the same at the same time. `at`:
        the second of the latter at which the world begins."""
        for number, instance in enumerate(self.instances):
            watched = self._engine.weather if weather is None else weather.get(instance.name, base.FAIR)
            if watched.paces:
                phase = at + number * GOLDEN % 1.0 * watched.span if weather is None else 0.0
                instance.weather = Weather(watched, phase)

    def _way(self, source: str, target: str) -> Way:
        return self._pulls.way(self._links.route(self._costs.spec, self._seats[source], self._seats[target]))

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
            publish_bandwidth=(engine.publish_bandwidth or 0.0) / self._token_bytes,
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
