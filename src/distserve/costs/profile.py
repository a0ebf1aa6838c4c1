"""Costs as a file: what was measured or published of an engine on a device, for one or more models
(docs/reference/costs.md describes the format, `format.py` reads it). Knows no plan and no simulator.

    costs.json --Profile.load()--> Profile --costs(model)--> ProfileCosts, which answers for one model
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from distserve.catalogue import canonical, model_spec
from distserve.cluster import Cluster
from distserve.costs import format
from distserve.costs.devices import Device, assumed_cluster, catalogue
from distserve.costs.format import Contents, Degree, Entry
from distserve.costs.latency import Coefficients, Latency
from distserve.costs.memory import capacity, stage_layers
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
TRUSTED = 0.05  # mean left-out error; what is further off says so


@dataclass(frozen=True, slots=True)
class Profile:
    """One costs file."""

    name: str
    contents: Contents

    @classmethod
    def load(cls, name: str | Path) -> Profile:
        """A shipped name or a file. Raises `UsageError` with the cure."""
        if str(name) in SHIPPED:
            source = resources.files("distserve").joinpath("data", "costs", f"{name}.json")
            return cls.from_dict(json.loads(source.read_text(encoding="utf-8")), str(name))
        try:
            table = json.loads(Path(name).read_text(encoding="utf-8"))
        except OSError as error:
            close = difflib.get_close_matches(str(name), SHIPPED, 1)
            cure = f"did you mean {close[0]}?" if close else f"give a file, or one of {', '.join(SHIPPED)}"
            raise UsageError(f"cannot read the costs {name}: {error.strerror}: {cure}") from None
        except ValueError as error:
            raise UsageError(f"the costs {name} are not JSON ({error}): measure again") from None
        return cls.from_dict(table, str(name))

    @classmethod
    def from_dict(cls, table: Mapping[str, Any], name: str) -> Profile:
        """Of parsed JSON. Raises `UsageError`, which names the place, the value and the cure."""
        return cls(name, format.read(table, name))

    @property
    def device(self) -> str:
        return self.contents.device

    def elsewhere(self, fingerprint: str) -> str:
        """A sentence for who means the machine of this fingerprint; empty where they are its own."""
        theirs = self.contents.machine.fingerprint
        if theirs == fingerprint:
            return ""
        where = f"measured on {theirs}" if theirs else "measured nobody says where"
        return f"the costs {self.name} were {where}, but this machine is {fingerprint}: measure it (distserve profile)"

    @property
    def models(self) -> dict[str, dict[int, Coefficients]]:
        """Of one pass through all layers: by model, by tp."""
        return {
            model: {tp: entry.coefficients for (tp, pp), entry in by_degree.items() if pp is None}
            for model, by_degree in self.contents.entries.items()
        }

    def costs(self, model: str, *, spec: ModelSpec | None = None, device: str | None = None) -> ProfileCosts:
        """`spec`: the model's shape, where the catalogue does not know it. `device`: what the plan or cluster is made
        of (None: no matter). Raises `PlanError` where the file is for other models or another device."""
        known = {canonical(known): known for known in self.contents.entries}
        known |= {known.lower(): known for known in self.contents.entries}
        name = model.lower() if model.lower() in known else canonical(model)
        if name not in known:
            raise PlanError(
                f"the costs {self.name} are for {', '.join(self.contents.entries)}, not for {model}: give its own, or "
                "none for an estimate"
            )
        if device is not None and device.lower() != self.device.lower():
            raise PlanError(
                f"the costs {self.name} are of the device {self.device}, not of {device}: give its own, or none for an "
                "estimate"
            )
        return ProfileCosts(self, known[name], spec or model_spec(model))


class ProfileCosts:
    """See `base.Costs`."""

    def __init__(self, profile: Profile, model: str, spec: ModelSpec) -> None:
        contents = profile.contents
        self.name = profile.name
        self.spec = spec
        self.dtype = contents.dtype
        self.engine = contents.engine
        self.device = _device(profile)
        self._accounting = contents.accounting
        self._model = model
        self._entries = contents.entries[model]
        self._used: dict[Degree, Entry] = {}  # what somebody asked for
        self.elsewhere: tuple[str, ...] = ()  # said in notes: that they were measured on another machine than is meant
        for (tp, _), entry in self._entries.items():
            _check_growth(f"the costs {self.name} for {model} at tp = {tp}", entry.coefficients, spec)

    def degrees(self) -> tuple[Degree, ...]:
        return tuple(sorted(self._entries, key=_in_order))

    def latency(self, tp: int, pp: int) -> Latency:
        degree = (tp, pp) if (tp, pp) in self._entries else (tp, None)
        if degree not in self._entries:
            known = ", ".join(map(_words, self.degrees()))
            raise PlanError(
                f"the costs {self.name} do not know {_words((tp, pp))} of {self._model}: they know {known}; on their "
                f"machine, distserve profile --tp {tp} --pp {pp} --add measures it"
            )
        share = stage_layers(self.spec, pp)[0] / self.spec.num_layers
        entry = self._used[degree] = self._entries[degree]
        engine = self.engine
        return Latency(
            entry.coefficients, pp, share, engine.handover, engine.prompt_step, engine.decode_step, engine.padded
        )

    def assumed_cluster(self, num_devices: int) -> Cluster:
        return assumed_cluster(self.device, num_devices)

    def kv_blocks(self, tp: int, pp: int, kv_memory: int | float | None = None) -> int:
        if kv_memory is None:
            kv_memory = self.engine.kv_memory
        found = capacity(
            self.spec, self.device.memory, tp, pp, dtype=self.dtype, kv_memory=kv_memory, accounting=self._accounting
        )
        if not found.fits:
            raise PlanError(
                f"{self._model} at tp = {tp} and pp = {pp} does not fit {self.device.name}: each device lacks "
                f"{found.missing / 2**30:.1f} GiB; raise tp or pp"
            )
        return found.num_blocks

    def notes(self, tokens: int, batch: int, context: int) -> list[str]:
        """Of the parallelisms that a latency was asked for."""
        used = sorted(self._used.items(), key=lambda item: _in_order(item[0]))
        found = list(self.elsewhere)
        if self.engine.weather.paces:
            prompts, decodes = self.engine.weather.mean
            found.append(
                f"the machine was not steady while the costs {self.name} were measured: steps with prompts took "
                f"{prompts:.2f} times as long as they can, those that decode {decodes:.2f} times, and do so here"
            )
        for key, largest, what in (
            ("prompt_tokens", tokens, "prompt tokens in a step"),
            ("batch", batch, "sequences in a decode step"),
            ("context", context, "tokens of context in a decode step"),
        ):
            below = [
                f"{limit:,} at {_words(degree)}"
                for degree, entry in used
                if entry.measured_to and (limit := getattr(entry.measured_to, key)) < largest
            ]
            if below:
                found.append(
                    f"extrapolated: up to {largest:,} {what}, but the costs {self.name} were measured up to "
                    f"{', '.join(below)}"
                )
        if unknown := [_words(degree) for degree, entry in used if entry.measured_to is None]:
            found.append(f"nobody says up to what sizes the costs {self.name} were measured at {', '.join(unknown)}")
        for degree, entry in used:
            for kind, error in (("prefill", entry.prefill_error), ("decode", entry.decode_error)):
                mean = error and error.left_out_mean
                if error and mean and mean > TRUSTED:
                    found.append(
                        f"the costs {self.name} at {_words(degree)} miss {kind} steps that they have not seen by "
                        f"{mean:.0%} on average, {error.left_out_max or mean:.0%} at worst"
                    )
        return found


def _in_order(degree: Degree) -> tuple[int, int]:
    tp, pp = degree
    return tp, pp or 0


def _words(degree: Degree) -> str:
    tp, pp = degree
    return f"tp = {tp}" if pp is None else f"tp = {tp}, pp = {pp}"


def _device(profile: Profile) -> Device:
    """Of the catalogue, or as the file describes the machine. Raises `PlanError` where neither says enough."""
    machine, name = profile.contents.machine, profile.device
    found = catalogue().get(name.lower())
    if found is None:
        if machine.memory is None or machine.link_bandwidth is None:
            raise PlanError(
                f"the costs {profile.name} are of the device {name}, which the catalogue does not know: their machine "
                f"must say memory (bytes) and link_bandwidth (bytes/s)"
            )
        found = Device(
            name, 0.0, 0.0, machine.memory, machine.link_bandwidth, False, machine.link_bandwidth, "measured"
        )
    return replace(
        found,
        memory=machine.memory or found.memory,
        link_bandwidth=machine.link_bandwidth or found.link_bandwidth,
        network_bandwidth=machine.network_bandwidth or found.network_bandwidth,
    )


def _check_growth(where: str, coefficients: Coefficients, spec: ModelSpec) -> None:
    """A negative `per_square` is kept as it was published where a step still grows with every token of a prompt as long
    as the model allows (token n of a prompt adds per_token + (2n - 1) per_square); else the fit is of no use."""
    for line in coefficients.prefill:
        last = line.per_token + (2 * spec.max_model_len - 1) * line.per_square
        if last < 0:
            longest = int((1 - line.per_token / line.per_square) / 2)
            raise PlanError(
                f"{where}: per_square = {line.per_square:g} makes steps shorter with prompts of more than {longest} "
                f"tokens, and the model takes {spec.max_model_len}: measure longer prompts and fit again"
            )
