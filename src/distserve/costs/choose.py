"""Which costs predict a model on a device, where a person may have named some. Knows no plan."""

from __future__ import annotations

from pathlib import Path

from distserve import machine
from distserve.catalogue import model_spec
from distserve.costs.base import Costs
from distserve.costs.devices import device as device_of
from distserve.costs.estimate import EstimatedCosts
from distserve.costs.profile import Profile

HERE = ("cpu",)  # devices without a maker's name: whoever speaks of one means this machine's
DEFAULTS = ("a100-80g",)  # shipped costs that are taken unasked where they know the model on the device


def choose_costs(model: str, device: str | None, costs: str | Path | None = None, *, here: bool | None = None) -> Costs:
    """`costs`, a shipped name or a file; None: what is shipped for the model on the device, else measured operators
    where their tables are installed, else the datasheet. `device` None: that of the costs. `here`: this machine is
    meant, so that costs of another one say so in their notes (None: by the device). Raises `UsageError` where the costs
    are for other models or another device, or either is unknown."""
    if costs is not None:
        profile = Profile.load(costs)
        found = profile.costs(model, spec=model_spec(model), device=device)
        if here or (here is None and profile.device in HERE):
            ours = machine.fingerprint(machine.resolve_device("auto") if profile.device not in HERE else profile.device)
            found.elsewhere = tuple(filter(None, [profile.elsewhere(ours)]))
        return found
    assert device is not None, "without costs a device must be named"
    kind = device_of(device)
    spec = model_spec(model)
    for name in DEFAULTS:
        profile = Profile.load(name)
        known = {entry.lower() for entry in profile.models}
        if profile.device == kind.name and model.lower() in known:
            return profile.costs(model, spec=spec)
    return EstimatedCosts(spec, kind)


def measured_on(costs: str | Path | None) -> str | None:
    """Fingerprint of the machine that these costs were measured on; None: they are of none in particular."""
    return (Profile.load(costs).contents.machine.fingerprint or None) if costs is not None else None
