"""What is known of a phase apart: which numbers of instances attain the goal at which rates. Knows no deployment.

One answer says more than itself. What attains a rate with n instances attains a lower one, and k times the rate with
k * n of them (each n could be left to itself). What misses it with n misses a higher rate, and misses the same rate an
instance with fewer of them, because more instances share a burst better. From `CELL` instances on they share it as well
as they ever will, but for `_MORE`.
"""

from __future__ import annotations

from distserve.plan import InstanceSpec, Policy, Role

CELL = 4  # instances of a phase that are simulated together at most
_MORE = 1.1

_Shape = tuple[Role, int, int, Policy | None]


class Known:
    """Answers so far, by shape."""

    def __init__(self) -> None:
        self._passed: dict[_Shape, list[tuple[int, float]]] = {}  # (instances, rate)
        self._missed: dict[_Shape, list[tuple[int, float]]] = {}

    def learn(self, spec: InstanceSpec, rate: float, attains: bool) -> None:
        where = self._passed if attains else self._missed
        where.setdefault(_shape(spec), []).append((spec.count, rate))

    def attains(self, spec: InstanceSpec, rate: float) -> bool | None:
        """None: not known."""
        count = spec.count
        for other, passed in self._passed.get(_shape(spec), ()):
            if (count >= other and rate <= passed) or rate <= passed * (count // other):
                return True
        for other, missed in self._missed.get(_shape(spec), ()):
            if count <= other and rate >= missed * count / other:
                return False
            if other >= CELL and rate >= _MORE * missed * count / other:
                return False
        return None

    def above(self, spec: InstanceSpec) -> float:
        """Requests/s of `spec.count` instances that are known to be too many; infinite where nothing is."""
        count = spec.count
        found = [
            missed * count / other * (1.0 if count <= other else _MORE)
            for other, missed in self._missed.get(_shape(spec), ())
            if count <= other or other >= CELL
        ]
        return min(found, default=float("inf"))

    def below(self, spec: InstanceSpec) -> float:
        """Requests/s of `spec.count` instances that are known to be attained."""
        found = [
            max(passed if spec.count >= other else 0.0, passed * (spec.count // other))
            for other, passed in self._passed.get(_shape(spec), ())
        ]
        return max(found, default=0.0)


def _shape(spec: InstanceSpec) -> _Shape:
    return spec.role, spec.tp, spec.pp, spec.policy
