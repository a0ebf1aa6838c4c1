"""Costs as a file: what was measured or published of an engine on a device, for one or more models
(docs/reference/costs.md describes the format). Knows no plan and no simulator.

    costs.json --Profile.load()--> Profile --costs(model)--> ProfileCosts, which answers for one model
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from distserve.catalogue import model_spec
from distserve.cluster import Cluster
from distserve.costs.base import Engine
from distserve.costs.devices import Device, assumed_cluster, device
from distserve.costs.latency import Coefficients, DecodeLine, Host, Latency, PrefillLine
from distserve.costs.memory import DISTSERVE, Accounting, capacity, stage_layers
from distserve.errors import PlanError, UsageError
from distserve.specs import ModelSpec

SHIPPED = (
    "a100-80g",
    "a100-80g-raw",
    "a100-80g-shipped",
    "a100-80g-vllm",
    "a100-80g-vllm-raw",
    "a100-80g-vllm-shipped",
)


@dataclass(frozen=True, slots=True)
class Profile:
    """One costs file."""

    name: str
    device: str
    dtype: str
    date: str
    source: str
    engine: Engine
    accounting: Accounting
    models: Mapping[str, Mapping[int, Coefficients]]  # by model, by tp

    @classmethod
    def load(cls, name: str | Path) -> Profile:
        """A shipped name or a file. Raises `UsageError` with the cure."""
        if str(name) in SHIPPED:
            source = resources.files("distserve").joinpath("data", "costs", f"{name}.json")
            return cls.from_dict(json.loads(source.read_text(encoding="utf-8")), str(name))
        try:
            table = json.loads(Path(name).read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(
                f"cannot read the costs {name}: {error.strerror}: give a file, or one of {', '.join(SHIPPED)}"
            ) from None
        except ValueError as error:
            raise UsageError(f"the costs {name} are not JSON: {error}") from None
        return cls.from_dict(table, str(name))

    @classmethod
    def from_dict(cls, table: Mapping[str, Any], name: str) -> Profile:
        engine = dict(table.get("engine", {}))
        for key in ("prompt_step", "decode_step"):
            if key in engine:
                engine[key] = Host(**engine[key])
        accounting = replace(DISTSERVE, **table.get("accounting", {}))
        models = {
            model: {
                int(tp): Coefficients(
                    tuple(PrefillLine(*line) for line in entry["prefill"]),
                    tuple(DecodeLine(int(line[0]), *line[1:]) for line in entry["decode"]),
                )
                for tp, entry in by_tp.items()
            }
            for model, by_tp in table["models"].items()
        }
        return cls(
            name=name,
            device=table["device"],
            dtype=table["dtype"],
            date=table["date"],
            source=table["source"],
            engine=Engine(**engine),
            accounting=replace(accounting, block_size=engine.get("block_size", accounting.block_size)),
            models=models,
        )

    def costs(self, model: str) -> ProfileCosts:
        """Raises `PlanError` where the file is for other models."""
        known = {known.lower(): known for known in self.models}
        if model.lower() not in known:
            raise PlanError(
                f"the costs {self.name} are for {', '.join(self.models)}, not for {model}: give its own, or none for a roofline"
            )
        return ProfileCosts(self, known[model.lower()])


class ProfileCosts:
    """See `base.Costs`."""

    def __init__(self, profile: Profile, model: str) -> None:
        self.name = profile.name
        self.spec: ModelSpec = model_spec(model)
        self.dtype = profile.dtype
        self.engine = profile.engine
        self.device: Device = device(profile.device)
        self._profile = profile
        self._by_tp = profile.models[model]

    def degrees(self) -> tuple[int, ...]:
        return tuple(sorted(self._by_tp))

    def latency(self, tp: int, pp: int) -> Latency:
        if tp not in self._by_tp:
            raise PlanError(
                f"the costs {self.name} do not know tp = {tp}: they were measured for {', '.join(map(str, self.degrees()))}"
            )
        engine = self.engine
        share = stage_layers(self.spec, pp)[0] / self.spec.num_layers
        return Latency(
            self._by_tp[tp], pp, share, engine.handover, engine.prompt_step, engine.decode_step, engine.padded
        )

    def assumed_cluster(self, num_devices: int) -> Cluster:
        return assumed_cluster(self.device, num_devices)

    def kv_blocks(self, tp: int, pp: int, kv_memory: int | float | None = None) -> int:
        found = capacity(
            self.spec,
            self.device.memory,
            tp,
            pp,
            dtype=self.dtype,
            kv_memory=kv_memory,
            accounting=self._profile.accounting,
        )
        if not found.fits:
            raise PlanError(
                f"tp = {tp}, pp = {pp} does not fit {self.device.name}: {found.missing} bytes are missing on a device"
            )
        return found.num_blocks

    def notes(self, tokens: int, batch: int, context: int) -> list[str]:
        return []
