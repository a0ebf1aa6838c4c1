"""What is asked of a deployment: requests of these lengths, within these targets, this often. Knows no deployment."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property

from distserve.errors import UsageError
from distserve.metrics import SLO, Targets
from distserve.sim.life import Life, lives_at
from distserve.traces import Arrival
from distserve.workload import Draws, Workload

GOAL = 0.9  # the share of requests that must meet their targets


@dataclass(frozen=True)
class Demand:
    """`workload` gives lengths and applications; its arrival times mean nothing here."""

    workload: Workload
    targets: Targets
    goal: float = GOAL
    cv: float = 1.0  # of the gaps between arrivals
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.goal < 1:
            raise UsageError(
                f"the attainment goal {self.goal:g} must be a share between 0 and 1, such as 0.9: no deployment "
                "attains 1 whatever comes"
            )
        known = set(self.apps)
        for app, _ in self.targets.by_app:
            if app not in known:
                names = ", ".join(repr(name) for name in sorted(known) if name)
                raise UsageError(
                    f"SLO for {app!r}, but {self.workload.name} has no request of it: "
                    + (f"its applications are {names}" if names else "its requests name no application (column app)")
                )

    @cached_property
    def apps(self) -> tuple[str, ...]:
        """The applications of its requests; ("",) where they name none."""
        return tuple(sorted({request.app for request in self.workload}))

    @cached_property
    def shares(self) -> dict[str, float]:
        """Of all requests, by application."""
        count = dict.fromkeys(self.apps, 0)
        for request in self.workload:
            count[request.app] += 1
        return {app: number / len(self.workload) for app, number in count.items()}

    @cached_property
    def pulled_tokens(self) -> float:
        """Of a mean request: an answer of one token leaves its KV where it is."""
        pulled = [request.prompt_tokens for request in self.workload if request.output_tokens > 1]
        return sum(pulled) / len(self.workload)

    def __getstate__(self) -> dict[str, object]:
        return {each.name: getattr(self, each.name) for each in fields(self)}  # what is derived can be derived again

    @cached_property
    def _draws(self) -> dict[int, Draws]:
        return {}

    def lives(self, rate: float, requests: int, seed: int = 0) -> list[Life]:
        """So many requests at this rate. The same seed gives the same requests at every rate, at gaps that differ by a
        factor only."""
        if seed not in self._draws:
            self._draws[seed] = Draws(self.workload, self.seed + seed, self.cv)
        draws = self._draws[seed]
        draws.reach(requests)
        return lives_at(draws.requests, draws.times, rate, requests)

    def only(self, app: str) -> Demand:
        """The requests of one application."""
        mine = tuple(request for request in self.workload if request.app == app)
        workload = replace(self.workload, name=f"{self.workload.name} ({app})", arrivals=mine)
        return replace(self, workload=workload, targets=Targets(self.targets.of(app)))

    def of_prefill(self) -> Demand:
        """What a prefill instance sees: first tokens."""
        workload = replace(self.workload, arrivals=tuple(map(_first_token, self.workload)))
        return replace(self, workload=workload, targets=_each(self.targets, lambda slo: SLO(ttft=slo.ttft)))

    def of_decode(self) -> Demand:
        """What a decode instance sees: time per output token."""
        return replace(self, targets=_each(self.targets, lambda slo: SLO(tpot=slo.tpot)))

    def scaled_targets(self, factor: float) -> Demand:
        """With targets `factor` times as long."""

        def scaled(slo: SLO) -> SLO:
            return SLO(*(None if value is None else value * factor for value in (slo.ttft, slo.tpot)))

        return replace(self, targets=_each(self.targets, scaled))


def _first_token(request: Arrival) -> Arrival:
    return replace(request, output_tokens=1)


def _each(targets: Targets, change: object) -> Targets:
    assert callable(change)
    return Targets(change(targets.default), tuple((app, change(slo)) for app, slo in targets.by_app))
