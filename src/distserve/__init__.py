"""DistServe: prefill and decode on different devices, for goodput. What programs import, loaded when it is used:

from distserve import Cluster, SLO, Workload, plan, simulate
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from distserve.compiled import install

if TYPE_CHECKING:
    from distserve.cluster import Cluster
    from distserve.metrics import SLO
    from distserve.planner.answer import InfeasibleError
    from distserve.planner.api import plan, simulate
    from distserve.workload import Workload

__all__ = ["SLO", "Cluster", "InfeasibleError", "Workload", "plan", "simulate"]

_HOMES = {
    "Cluster": "distserve.cluster",
    "InfeasibleError": "distserve.planner.answer",
    "SLO": "distserve.metrics",
    "Workload": "distserve.workload",
    "plan": "distserve.planner.api",
    "simulate": "distserve.planner.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


class _Package(ModuleType):
    """A package whose `plan` is the function. The module of that name, where the noun `Plan` lives, is found as all
    modules are (`from distserve.plan import Plan`); only the name here, which importing it would take, is not its."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
install()
