"""The search: which deployment meets a rate with the fewest devices, or the highest rate with the devices that there
are. Knows no file and no screen.

It follows DistServe (OSDI'24, section 4): phases are looked at apart, and what they need is put together, for nodes
with fast links between them (Algorithm 1) or inside nodes only (Algorithm 2). What is beyond the paper: whatever is put
together is judged whole (joint attainment, router, transfers), every ratio of prefill to decode instances is a
candidate, and so are colocated instances:

    for T = 1, 2, 3, ... devices
        all deployments of T devices  --bounds.py-->  those that arithmetic does not rule out
                                      --phases apart, simulated-->  those whose phases attain the rate
                                      --whole, simulated-->  the answers

so that the first T with an answer is the least there is. Nothing is left out but because of

    bounds      no deployment does better (the argument stands in bounds.py)
    phases      no deployment attains more than its prefill side or its decode side alone (phases.py), and what one
                answer says of others (known.py)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from distserve.plan import InstanceSpec, Plan, Role
from distserve.planner.affinity import network_bound
from distserve.planner.ask import Climb, Descent, Question, World, ask, climb, descend
from distserve.planner.bounds import Bounds
from distserve.planner.candidates import (
    Deployment,
    Shape,
    colocated_spec,
    decode_spec,
    pairs_of,
    policies,
    prefill_spec,
    shapes,
    units,
)
from distserve.planner.goodput import QUICK, ROUGH, USUAL, Length, Verdict
from distserve.planner.jobs import Jobs
from distserve.planner.known import CELL, Known
from distserve.planner.pack import pack

DISAGGREGATED = "disaggregated"
COLOCATED = "colocated"
MIXED = "mixed"  # colocated instances beside disaggregated ones
KINDS = (DISAGGREGATED, COLOCATED, MIXED)
_SMALL = 8  # devices of a deployment up to which every mixture is judged
_SHAPES, _MIXTURES = 3, 2  # beyond: of how many shapes for each role, and how many of each number of devices
_POOLED = 1.1  # what a mixture attains over its parts at most: a burst that one cannot take the other may
_LENIENT = 0.97  # of the rate that is needed
_UNEVEN = 1.25  # times the rate that links can bear where pulls are spread evenly: they may be spread better
_SURELY = 1 + 1e-6  # a rate that was missed is missed, whatever its last digit


@dataclass(frozen=True, slots=True)
class Found:
    """A deployment that attains the goal."""

    deployment: Deployment
    plan: Plan  # with its seats
    verdict: Verdict  # at the rate that was asked for, or for one copy at its share
    goodput: float = 0.0  # requests/s of all of it; 0: not looked for

    @property
    def num_devices(self) -> int:
        return self.deployment.num_devices


class Search:
    """Of one demand, with one algorithm."""

    def __init__(
        self,
        world: World,
        jobs: Jobs,
        *,
        whose: str = "",
        low_affinity: bool = False,
        max_devices: int | None = None,
        scale: float = 1.0,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.world = world
        self.demand = world.demand(whose, None, scale)
        self.low_affinity = low_affinity
        self.max_devices = min(max_devices or world.cluster.num_devices, world.cluster.num_devices)
        self.known = Known()
        self.bounds = Bounds(world.costs, self.demand)
        self.simulated = 0  # requests
        self.rejected: set[Deployment] = set()  # a longer run said no
        self._jobs = jobs
        self._whose, self._scale = whose, scale
        self._say = say
        self._shapes = shapes(world.costs, world.cluster, self.bounds.moments.longest, self.max_devices)
        self._prefill = [s for s in self._shapes if self.bounds.most(prefill_spec(s, 1))]
        self._decode = [s for s in self._shapes if self.bounds.most(decode_spec(s, 1))]
        self._colocated = [s for s in self._shapes if self.bounds.most(InstanceSpec(Role.COLOCATED, s.tp, s.pp))]
        self._units: list[Deployment] | None = None
        self._settled: set[tuple[InstanceSpec, float]] = set()
        self._judged: dict[tuple[Deployment, float], Verdict] = {}

    # -- the two questions ---------------------------------------------------------------------------------------------

    def fewest(
        self, rate: float, kinds: Iterable[str] = KINDS, *, least: int = 1, most: int | None = None, limit: int = 0
    ) -> list[Found]:
        """All deployments that attain the goal at `rate` with the fewest devices, from `least` on; empty: none does.
        `limit` (0: none): so many of each number of devices are judged, the most promising."""
        pure = [kind for kind in kinds if kind != MIXED]
        most = min(most or self.max_devices, self.max_devices)
        found: list[Found] = []
        for number in range(least, most + 1):
            if found := self.with_devices(number, rate, pure, limit):
                break
        if MIXED not in kinds:
            return found
        until = found[0].num_devices if found else most
        for number in range(max(least, 3), until + 1):
            if mixed := self.with_devices(number, rate, [MIXED], limit or (0 if number <= _SMALL else _MIXTURES)):
                return mixed + (found if number == until else [])
        return found

    def with_devices(self, number: int, rate: float, kinds: Iterable[str] = KINDS, limit: int = 0) -> list[Found]:
        """Those of exactly so many devices."""
        kinds = tuple(kinds)
        while True:
            alive = [
                d
                for d in self.deployments(number, rate, kinds)
                if self.promise(d) > rate * _SURELY and d not in self.rejected
            ]
            open_questions = self._open(alive, rate)
            if not open_questions:
                break
            self._settle(open_questions)
        plans: dict[Deployment, Plan] = {}
        for d in sorted(alive, key=lambda d: -self.promise(d)):
            if plan := self._seated(d, rate):
                plans[d] = plan
            if limit and len(plans) == limit:
                break
        alive = list(plans)
        if alive:
            self._say(f"{number} devices: {len(alive)} deployments")
        verdicts = self.judge(alive, rate)
        return [Found(d, plans[d], verdict) for d, verdict in zip(alive, verdicts, strict=True) if verdict.attains]

    def _seated(self, deployment: Deployment, rate: float) -> Plan | None:
        """None: it cannot be seated, or its links cannot move the KV of so many requests."""
        plan = pack(deployment, self.world.cluster, self.world.model)
        apart = deployment.count(Role.DECODE) and not deployment.count(Role.COLOCATED)
        if plan is None or not apart or deployment.span or self.world.cluster.nodes == 1:
            return plan
        costs, cluster = self.world.costs, self.world.cluster
        enough = rate / _UNEVEN
        return plan if enough <= network_bound(costs, cluster, self.demand, plan, enough) else None

    @property
    def smallest(self) -> int:
        """Devices of the smallest instance that fits."""
        return self._shapes[0].num_ranks

    def highest(self, kinds: Iterable[str] = KINDS, tolerance: float = 0.02) -> list[Found]:
        """The deployments with the highest goodput, to this tolerance, with the devices that there are; best first.

        Only those that leave no room for another instance: more instances attain no less."""
        kinds, target, lost = tuple(kinds), 0.0, set[Deployment]()
        pool, best = self._largest([kind for kind in kinds if kind != MIXED]), list[Found]()
        while True:
            alive = [d for d in pool if d not in lost and self.promise(d) > target]
            head = sorted(alive, key=lambda d: -self.promise(d))[:8]
            if not head and MIXED in kinds:
                pool, kinds = self._largest_mixtures(target), ()
                continue
            if not head:
                return best
            if wanted := self._open(head, target):
                self._settled.update(wanted)
                self._settle([(spec, max(rate, 0.7 * self.bounds.most(spec) * spec.count)) for spec, rate in wanted])
                continue
            chunk = [d for d in head if pack(d, self.world.cluster)][:4]
            lost.update(chunk or head)
            found = self._challengers(chunk, target)
            raised = (each for each in self.raise_(found, 0.0) if each.goodput)
            best = sorted([*best, *raised], key=lambda each: -each.goodput)
            if best:
                self._say(f"{best[0].goodput:.3g} requests/s with {best[0].deployment}")
                target = best[0].goodput * (1 + tolerance)

    def _challengers(self, deployments: list[Deployment], rate: float) -> list[Found]:
        """Those that attain the goal at the rate."""
        probe = rate or min((self.promise(d) for d in deployments), default=1.0) / 4
        verdicts = self.judge(deployments, probe)
        plans = [pack(d, self.world.cluster, self.world.model) for d in deployments]
        return [
            Found(d, plan, verdict)
            for d, plan, verdict in zip(deployments, plans, verdicts, strict=True)
            if plan and (verdict.attains or not rate)
        ]

    def _largest_mixtures(self, rate: float) -> list[Deployment]:
        found: list[Deployment] = []
        for number in range(max(3, self.max_devices - self.smallest + 1), self.max_devices + 1):
            promising = (d for d in self._mixtures(number) if self.promise(d) > rate)
            ordered = sorted(promising, key=lambda d: -self.promise(d))
            found += ordered if number <= _SMALL else ordered[: 4 * _MIXTURES]
        return found

    def _largest(self, kinds: Sequence[str]) -> list[Deployment]:
        found = []
        for number in range(max(1, self.max_devices - self.smallest + 1), self.max_devices + 1):
            found += list(self.deployments(number, 0.0, [kind for kind in kinds if not self._copied(kind)]))
        most: dict[Deployment, Deployment] = {}  # one copy: all of them
        for number in range(1, self.max_devices + 1):
            for d in self.deployments(number, 0.0, [kind for kind in kinds if self._copied(kind)]):
                one = replace(d, copies=1, groups=tuple(replace(spec, count=1) for spec in d.groups[: d.span == 0]))
                most[one if not d.span else replace(d, copies=1)] = d
        return found + list(most.values())

    def _copied(self, kind: str) -> bool:
        return kind == COLOCATED or self.low_affinity

    # -- candidates ----------------------------------------------------------------------------------------------------

    def deployments(self, number: int, rate: float, kinds: Iterable[str]) -> Iterator[Deployment]:
        """Of exactly so many devices; what arithmetic rules out at once is left out already."""
        for kind in kinds:
            if kind == COLOCATED:
                yield from self._colocations(number)
            elif kind == MIXED:
                yield from self._mixtures(number)
            elif self.low_affinity:
                yield from self._copies(number)
            else:
                yield from self._ratios(number, rate)

    def _ratios(self, number: int, rate: float) -> Iterator[Deployment]:
        for first in self._prefill:
            least = rate / self.bounds.most(prefill_spec(first, 1))
            for second in self._decode:
                others = rate / self.bounds.most(decode_spec(second, 1))
                if least * first.num_ranks + others * second.num_ranks > number:
                    continue
                for n, m in pairs_of(first, second, number):
                    yield Deployment((prefill_spec(first, n), decode_spec(second, m)))

    def _copies(self, number: int) -> Iterator[Deployment]:
        if self._units is None:
            allowed = [s for s in self._shapes if s in self._prefill or s in self._decode]
            every = units(self.world.costs.spec, allowed, self.world.cluster, self.max_devices)
            self._units = [u for u in every if all(self.bounds.most(spec) for spec in u.groups)]
        for unit in self._units:
            copies, rest = divmod(number, unit.num_devices)
            if not rest:
                yield replace(unit, copies=copies)

    def _colocations(self, number: int) -> Iterator[Deployment]:
        for shape in self._colocated:
            count, rest = divmod(number, shape.num_ranks)
            if not rest:
                for policy in policies(self.world.costs, self.world.cluster):
                    yield Deployment((colocated_spec(shape, count, policy),))

    def _mixtures(self, number: int) -> Iterator[Deployment]:
        """Inside a node where KV stays there."""
        if not self.low_affinity:
            yield from self._beside(number)
            return
        for size in range(3, max(self.world.cluster.node_sizes) + 1):
            if number % size == 0:
                for one in self._beside(size):
                    yield replace(one, copies=number // size, span=1)

    def _beside(self, number: int) -> Iterator[Deployment]:
        first, second, third = (
            self._best(of_role, role, number)
            for of_role, role in (
                (self._prefill, Role.PREFILL),
                (self._decode, Role.DECODE),
                (self._colocated, Role.COLOCATED),
            )
        )
        for together in third:
            for count in range(1, number // together.num_ranks + 1):
                left = number - count * together.num_ranks
                for one, other in product(first, second):
                    for n, m in pairs_of(one, other, left):
                        for policy in policies(self.world.costs, self.world.cluster):
                            apart = prefill_spec(one, n), decode_spec(other, m)
                            yield Deployment((*apart, colocated_spec(together, count, policy)))

    def _best(self, of_role: list[Shape], role: Role, number: int) -> list[Shape]:
        """The shapes that promise most for a device; all for a few devices."""
        if number <= _SMALL:
            return of_role

        def promise(shape: Shape) -> float:
            spec = InstanceSpec(role, shape.tp, shape.pp, CELL)
            return min(self.bounds.most(spec) * CELL, self.known.above(spec)) / shape.num_ranks

        return sorted(of_role, key=promise, reverse=True)[:_SHAPES]

    # -- what is ruled out ---------------------------------------------------------------------------------------------

    def promise(self, deployment: Deployment) -> float:
        """Requests/s that it may attain at most, as far as is known."""
        by_role = dict.fromkeys(Role, 0.0)
        for spec in deployment.groups:
            by_role[spec.role] += min(self.bounds.most(spec) * spec.count, self.known.above(spec))
        apart, together = min(by_role[Role.PREFILL], by_role[Role.DECODE]), by_role[Role.COLOCATED]
        return deployment.copies * (apart + together) * (_POOLED if apart and together else 1.0)

    def _open(self, alive: list[Deployment], rate: float) -> list[tuple[InstanceSpec, float]]:
        """Phases that nothing is known of at the rates at which they are needed."""
        found: dict[InstanceSpec, float] = {}
        for deployment in alive:
            if len(deployment.groups) > 2:
                continue  # which part of a mixture gets which share is the router's to say
            share = rate / deployment.copies
            for spec in deployment.groups:
                cell = replace(spec, count=min(spec.count, CELL))
                if self.known.attains(spec, share) is None:
                    needed = share * cell.count / spec.count
                    if (cell, needed) not in self._settled:
                        found[cell] = min(needed, found.get(cell, needed))
        return list(found.items())

    def _settle(self, wanted: list[tuple[InstanceSpec, float]]) -> None:
        """Asks whether phases attain the goal alone; where not, also at lower rates, because those will be asked for.

        Asked at a little less than needed: a phase is ruled out for good, and by a short run."""
        asked = []
        for spec, rate in wanted:
            self._settled.add((spec, rate))
            question = Question(spec, rate * _LENIENT, self.bounds.stay(spec), self._whose, QUICK, scale=self._scale)
            asked.append(Descent(question))
        self._say(f"{len(asked)} phases apart")
        for (spec, _), verdicts in zip(wanted, self._jobs.map(descend, asked), strict=True):
            for verdict in verdicts:
                self.simulated += verdict.requests
                self.known.learn(spec, verdict.rate / _LENIENT, verdict.attains)

    # -- whole deployments ---------------------------------------------------------------------------------------------

    def judge(self, deployments: list[Deployment], rate: float) -> list[Verdict]:
        """Each as a whole at the rate; copies of a unit by one of them at its share: they share requests evenly."""
        missing = [d for d in deployments if (d, rate) not in self._judged]
        questions = [self.question(d, rate) for d in missing]
        for deployment, verdict in zip(missing, self._jobs.map(ask, questions), strict=True):
            self._judged[deployment, rate] = verdict
            self.simulated += verdict.requests
        return [self._judged[d, rate] for d in deployments]

    def question(self, deployment: Deployment, rate: float) -> Question:
        one = replace(deployment, copies=1)
        plan = pack(one, self.world.cluster, self.world.model)
        assert plan is not None, f"{deployment} was seated before"
        return Question(plan, rate / deployment.copies, self.stay(deployment), self._whose, USUAL, scale=self._scale)

    def stay(self, deployment: Deployment) -> float:
        """Seconds that a request stays, about."""
        groups = deployment.groups
        if any(spec.role is Role.COLOCATED for spec in groups):
            return max(self.bounds.stay(spec) for spec in groups)
        return sum(self.bounds.stay(spec) for spec in groups)

    def raise_(self, found: list[Found], rate: float, tolerance: float = 0.05) -> list[Found]:
        """With the goodput of each, roughly (0: none); best first. Below the first it is a bound, not reached."""
        left, target = sorted(found, key=lambda each: -self.promise(each.deployment)), rate
        ranked: list[Found] = []
        while left:
            first, left = left[:2], left[2:]
            climbs = self._jobs.map(climb, [self.climbing(each, target, tolerance, ROUGH) for each in first])
            ranked += [self.climbed(*each) for each in zip(first, climbs, strict=True)]
            ranked.sort(key=lambda each: -each.goodput)
            if not (target := max(rate, ranked[0].goodput * (1 + tolerance))):
                continue
            verdicts = self.judge([each.deployment for each in left], target)
            below = [each for each, verdict in zip(left, verdicts, strict=True) if not verdict.attains]
            left = [each for each in left if each not in below]
            most = ranked[0].goodput or target
            ranked += [replace(each, goodput=min(most, self.promise(each.deployment))) for each in below]
        return ranked

    def climbing(self, each: Found, rate: float, tolerance: float = 0.03, length: Length = USUAL) -> Climb:
        """The question for its goodput, from `rate` on (0: wherever it is)."""
        copies = each.deployment.copies
        most = max(self.promise(each.deployment) * 1.1, rate * 1.1)
        question = replace(self.question(each.deployment, rate * 1.1 or most * 0.7), length=length)
        return Climb(question, most / copies, tolerance, step=1.15)

    def climbed(self, each: Found, verdicts: list[Verdict]) -> Found:
        """With the goodput that the answer gives."""
        self.simulated += sum(verdict.requests for verdict in verdicts)
        best = max((v.rate for v in (each.verdict, *verdicts) if v.attains), default=0.0)
        return replace(each, goodput=best * each.deployment.copies)
