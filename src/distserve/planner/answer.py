"""The answer of a search: the plan, how good it is, and why it was chosen. Knows how to be JSON, not how it was
found."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from distserve.errors import DistserveError
from distserve.metrics import Report, Targets
from distserve.plan import InstanceSpec, Plan, Role
from distserve.planner.curves import Curve
from distserve.planner.goodput import Goodput
from distserve.sim.simulate import Split


class InfeasibleError(DistserveError):
    """No deployment attains the goal. The message names the nearest targets, or the highest rate, that can be met."""


@dataclass(frozen=True, slots=True)
class Alternative:
    """What else was looked at."""

    description: str
    devices: int
    goodput: float  # requests/s, roughly; 0: it does not attain the goal at the rate
    loses: str  # by how much, in words

    @property
    def per_device(self) -> float:
        return self.goodput / self.devices if self.devices else 0.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One plan for the requests of `app`, or for all ("")."""

    plan: Plan  # with its seats
    goodput: Goodput  # of the whole plan
    rate: float | None  # requests/s that were asked for; None: as many as possible
    report: Report  # simulated at `rate`, or at what the search took for the goodput, before it was measured closely
    targets: Targets
    goal: float
    algorithm: str  # "high" or "low": how closely the plan ties prefill and decode instances
    workload: str
    costs: str
    cluster: str
    binding: str  # "ttft" or "tpot": what is missed first beyond the goodput
    bottleneck: str  # the role that is
    utilization: dict[str, float]  # by role: share of the time that its instances' first stages are busy
    split: Split  # of the mean request
    runner_up: Alternative | None
    other_kind: Alternative | None  # the best without disaggregation; with it, where the plan is colocated
    notes: tuple[str, ...] = ()
    app: str = ""
    seconds: float = 0.0  # the search took
    simulated: int = 0  # requests, in the search
    curves: tuple[Curve, ...] = field(default=(), repr=False)  # of it and what else was looked at; (): not asked for

    @property
    def num_devices(self) -> int:
        return self.plan.num_devices

    @property
    def goodput_per_device(self) -> float:
        return self.goodput.rate / self.num_devices

    def instances(self, role: Role) -> tuple[InstanceSpec, ...]:
        return tuple(spec for spec in self.plan.instances if spec.role is role)

    @property
    def prefill(self) -> InstanceSpec | None:
        """How prefill instances are split: its `tp`, `pp` and `count`. None: there are none."""
        return next(iter(self.instances(Role.PREFILL)), None)

    @property
    def decode(self) -> InstanceSpec | None:
        return next(iter(self.instances(Role.DECODE)), None)

    @property
    def colocated_instances(self) -> InstanceSpec | None:
        return next(iter(self.instances(Role.COLOCATED)), None)

    @property
    def ratio(self) -> tuple[int, int] | None:
        """Prefill to decode instances; None: nothing is disaggregated."""
        return (self.prefill.count, self.decode.count) if self.prefill and self.decode else None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        per_role = {
            str(role): {"tp": spec.tp, "pp": spec.pp, "instances": spec.count, "devices": spec.num_ranks * spec.count}
            for role in Role
            for spec in self.instances(role)
        }
        return {
            "model": self.plan.model,
            "device": self.plan.device,
            "cluster": self.cluster,
            "workload": self.workload,
            "app": self.app or None,
            "rate": self.rate,
            "slo": asdict(self.targets.default),
            "slo_by_app": {app: asdict(slo) for app, slo in self.targets.by_app},
            "goal": self.goal,
            "algorithm": self.algorithm,
            "costs": self.costs,
            "devices": self.num_devices,
            "roles": per_role,
            "ratio": list(self.ratio) if self.ratio else None,
            "goodput": asdict(self.goodput) | {"per_device": self.goodput_per_device},
            "binding": self.binding,
            "bottleneck": self.bottleneck,
            "utilization": self.utilization,
            "split": asdict(self.split),
            "report": self.report.to_dict(),
            "runner_up": _alternative(self.runner_up),
            "disaggregated" if self.ratio is None else "colocated": _alternative(self.other_kind),
            "instances": [
                {"name": replica.name, "role": str(replica.role), "tp": replica.spec.tp, "pp": replica.spec.pp}
                | {"devices": list(replica.devices)}
                for replica in self.plan.replicas()
            ],
            "curves": [asdict(curve) for curve in self.curves],
            "notes": list(self.notes),
            "search": {"seconds": self.seconds, "simulated_requests": self.simulated},
            "plan": self.plan.to_toml(),
        }


@dataclass(frozen=True, slots=True)
class Dedicated:
    """A plan for each application: they need fewer devices together than one plan for all."""

    answers: dict[str, Answer]  # by application
    shared: Alternative | None  # what one plan for all would take; None: it does not attain the goals

    @property
    def num_devices(self) -> int:
        return sum(answer.num_devices for answer in self.answers.values())

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "devices": self.num_devices,
            "apps": {app: answer.to_dict() for app, answer in self.answers.items()},
            "shared": _alternative(self.shared),
        }


def _alternative(found: Alternative | None) -> dict[str, Any] | None:
    return None if found is None else asdict(found) | {"goodput_per_device": found.per_device}
