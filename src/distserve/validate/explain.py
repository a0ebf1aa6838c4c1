"""Where a prediction's error comes from: the steps themselves, or what is made of them.

The server counts its steps and their seconds by role (/metrics). Beside the imagined steps of the same role they tell
how far the machine was from its costs during that very run; and where the run is imagined once more with steps as long
as they were, what error is left is that of queues, batches, pulls, gateway and client. Knows no server.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from distserve.cluster import Cluster
from distserve.costs.base import Costs
from distserve.costs.latency import Coefficients, DecodeLine, Latency, Points, PrefillLine
from distserve.plan import Plan, Role
from distserve.sim.simulate import Imagination, imagine
from distserve.validate.record import Measured

STEP = "distserve:step_seconds"
_TIMES = 3  # that factors are found anew: longer steps make larger batches
_ALONE = (Role.PREFILL, Role.DECODE)


@dataclass(frozen=True, slots=True)
class Steps:
    """Of one role."""

    measured: float  # seconds of the mean step
    predicted: float

    @property
    def ratio(self) -> float:
        """How many times as long as predicted they took."""
        return self.measured / self.predicted


def steps(run: Measured, imagined: Imagination) -> dict[str, Steps]:
    """By role, of those that both worlds have steps of."""
    found = {}
    for role in map(str, Role):
        count = run.server.get(f"{STEP} {role} count", 0.0)
        mine = [usage for name, usage in imagined.usage.items() if name.startswith(role)]
        number = sum(usage.steps for usage in mine)
        if count and number:
            busy = sum(usage.busy for usage in mine)
            found[role] = Steps(run.server[f"{STEP} {role} sum"] / count, busy / number)
    return found


def as_measured(run: Measured, plan: Plan, costs: Costs) -> Imagination | None:
    """The run imagined with steps as long as its own were, on average by role; None: the server did not tell."""
    factors: dict[str, float] = {}
    imagined = imagine(plan, run.workload(), costs)
    for _ in range(_TIMES):
        found = steps(run, imagined)
        if not found:
            return None
        factors = {role: factors.get(role, 1.0) * each.ratio for role, each in found.items()}
        imagined = imagine(plan, run.workload(), Slower(costs, factors))
    return imagined


class Slower:
    """Costs (`base.Costs`) whose steps take so many times as long: those with prompts, and those that decode."""

    def __init__(self, costs: Costs, factors: Mapping[str, float]) -> None:
        self.name, self.spec, self.dtype, self.engine = costs.name, costs.spec, costs.dtype, costs.engine
        self._costs = costs
        both = factors.get(Role.COLOCATED, 1.0)
        self._prompts, self._decodes = (factors.get(role, both) for role in _ALONE)

    def latency(self, tp: int, pp: int) -> Latency:
        known = self._costs.latency(tp, pp)
        return replace(known, coefficients=self._scaled(known.coefficients))

    def _scaled(self, known: Coefficients) -> Coefficients:
        return Coefficients(
            tuple(PrefillLine(*(self._prompts * value for value in line)) for line in known.prefill),
            tuple(DecodeLine(line.from_batch, *(self._decodes * value for value in line[1:])) for line in known.decode),
            tuple((key, _times(points, self._prompts)) for key, points in known.prefill_rest),
            tuple((key, _times(points, self._decodes)) for key, points in known.decode_rest),
        )

    def kv_blocks(self, tp: int, pp: int, kv_memory: int | float | None = None) -> int:
        return self._costs.kv_blocks(tp, pp, kv_memory)

    def degrees(self) -> tuple[int, ...]:
        return self._costs.degrees()

    def assumed_cluster(self, num_devices: int) -> Cluster:
        return self._costs.assumed_cluster(num_devices)

    def notes(self, tokens: int, batch: int, context: int) -> list[str]:
        return self._costs.notes(tokens, batch, context)


def _times(points: Points, factor: float) -> Points:
    return tuple((x, factor * y) for x, y in points)
