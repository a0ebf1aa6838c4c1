"""Costs of models that nobody has measured on the device at hand: operator tables where there are some (module
`aiconfigurator`), else the roofline. Knows no costs file; its notes say which of the two it was, and why.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from distserve.cluster import Cluster
from distserve.costs import aiconfigurator, roofline
from distserve.costs.base import Engine
from distserve.costs.devices import Device, assumed_cluster, catalogue
from distserve.costs.latency import Coefficients, Latency
from distserve.costs.memory import Accounting, allowed_tp, capacity, stage_layers
from distserve.costs.roofline import Efficiency
from distserve.errors import PlanError
from distserve.specs import ModelSpec


@dataclass(frozen=True, slots=True)
class Estimate:
    """Coefficients, and a sentence that says where they come from."""

    coefficients: Coefficients
    source: str


def estimate(
    spec: ModelSpec,
    device: Device,
    tp: int = 1,
    *,
    dtype: str | None = None,
    efficiency: Efficiency | None = None,
    tables: bool = True,
) -> Estimate:
    """Of one pass through all layers at one tensor parallelism. `efficiency` asks for the roofline with these factors;
    `tables` False for the roofline with its own. Raises `PlanError` where tp does not divide the model."""
    reason = "as asked"
    if tables and efficiency is None:
        try:
            if device != catalogue().get(device.name):
                raise aiconfigurator.NoTables("its numbers are not the catalogue's")
            return Estimate(*aiconfigurator.coefficients(spec, device.name, tp, dtype=dtype))
        except aiconfigurator.NoTables as error:
            reason = str(error)
    found = roofline.coefficients(spec, device, tp, dtype=dtype, efficiency=efficiency or Efficiency())
    return Estimate(found, f"roofline of {device.name} by its datasheet ({reason})")


class EstimatedCosts:
    """See `base.Costs`."""

    def __init__(
        self,
        spec: ModelSpec,
        device: Device,
        *,
        dtype: str | None = None,
        engine: Engine | None = None,
        accounting: Accounting | None = None,
        efficiency: Efficiency | None = None,
        tables: bool = True,
    ) -> None:
        self.name = f"estimate for {device.name}"
        self.spec = spec
        self.engine = engine or Engine()
        self.device = device
        self.dtype = spec.dtype if dtype is None else dtype
        self._accounting = replace(accounting or Accounting(), block_size=self.engine.block_size)
        self._efficiency = efficiency
        self._tables = tables
        self._by_tp: dict[int, Estimate] = {}

    def degrees(self) -> tuple[tuple[int, int | None], ...]:
        return tuple((tp, None) for tp in allowed_tp(self.spec))

    def latency(self, tp: int, pp: int) -> Latency:
        share = stage_layers(self.spec, pp)[0] / self.spec.num_layers
        engine = self.engine
        steps = engine.prompt_step, engine.decode_step
        return Latency(self._estimate(tp).coefficients, pp, share, engine.handover, *steps, engine.padded)

    def kv_blocks(self, tp: int, pp: int, kv_memory: int | float | None = None) -> int:
        found = capacity(
            self.spec,
            self.device.memory,
            tp,
            pp,
            dtype=self.dtype,
            kv_memory=kv_memory,
            accounting=self._accounting,
        )
        if not found.fits:
            raise PlanError(
                f"an instance with tp = {tp} and pp = {pp} does not fit {self.device.name}: each device lacks "
                f"{found.missing / 2**30:.1f} GiB; raise tp or pp"
            )
        return found.num_blocks

    def assumed_cluster(self, num_devices: int) -> Cluster:
        return assumed_cluster(self.device, num_devices)

    def notes(self, tokens: int, batch: int, context: int) -> list[str]:
        """Where each parallelism's numbers come from: nothing was measured, so that nothing lies beyond it."""
        return [f"costs at tp = {tp}: {found.source}" for tp, found in sorted(self._by_tp.items())]

    def _estimate(self, tp: int) -> Estimate:
        if tp not in self._by_tp:
            self._by_tp[tp] = estimate(
                self.spec, self.device, tp, dtype=self.dtype, efficiency=self._efficiency, tables=self._tables
            )
        return self._by_tp[tp]
