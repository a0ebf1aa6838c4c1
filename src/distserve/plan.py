"""A plan: which instances serve a model, with which role, how large, on which devices. One file that a human can diff.

    Plan  --replicas()-->  Replica ("prefill-0", "decode-0", ...)  --placement.place()-->  devices of every rank

Knows no model, no memory size and no process: whether a plan fits a checkpoint is the launcher's question.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from distserve import toml_file
from distserve.errors import PlanError, UsageError


class Role(StrEnum):
    """Which scheduler an instance runs."""

    PREFILL = "prefill"
    DECODE = "decode"
    COLOCATED = "colocated"  # both phases


class Policy(StrEnum):
    """How a colocated instance mixes the phases."""

    CHUNKED = "chunked"  # decode steps carry pieces of prompts, `chunk_tokens` a step at most
    PREFILL_FIRST = "prefill-first"  # whole prompts before any decode step, as in early vLLM


_DEVICE = re.compile(r"(?:(?P<node>[A-Za-z][\w.-]*):)?(?P<index>\d+)")
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[KMGT]i?B|B|%)?", re.IGNORECASE)
_UNITS = {"b": 1} | {f"{u}ib": 1 << 10 * i for i, u in enumerate("kmgt", 1)}
_UNITS |= {f"{u}b": 1000**i for i, u in enumerate("kmgt", 1)}
_Word = TypeVar("_Word", Role, Policy)


def parse_memory(value: str | int | float) -> int | float:
    """Bytes (an int) or a share of the device's memory (a float up to 1).

    `0.2` and `20%` are shares; `2GiB`, `500MB` and whole numbers above 1 are bytes. Raises `UsageError`.
    """
    cure = "give a share of the device's memory such as 0.2 or 20%, or a size such as 2GiB"
    found = _SIZE.fullmatch(str(value).strip()) if not isinstance(value, bool) else None
    if found is None:
        raise UsageError(f"{value!r} is not an amount of memory: {cure}")
    number, unit = float(found["number"]), (found["unit"] or "").lower()
    if unit == "%":
        number, unit = number / 100, ""
    elif unit or number > 1:
        size = number * _UNITS.get(unit, 1)
        if size < 1 or (not unit and not number.is_integer()):
            raise UsageError(f"{value!r} is neither a share up to 1 nor whole bytes: {cure}")
        return int(size)
    if not 0 < number <= 1:
        raise UsageError(f"{value!r} is no share of the memory between 0 and 1: {cure}")
    return number


@dataclass(frozen=True, slots=True)
class InstanceSpec:
    """`count` equal instances of one role."""

    role: Role
    tp: int = 1  # tensor parallelism: devices that share each layer
    pp: int = 1  # pipeline parallelism: stages of layers
    count: int = 1  # replicas
    policy: Policy | None = None  # colocated only; None: chunked
    chunk_tokens: int | None = None  # colocated, chunked: tokens a step at most; None: measured at start
    max_batch_tokens: int | None = None  # prefill's knee Lm, tokens a batch; None: the server's setting
    kv_memory: int | float | None = None  # bytes, or a share of the device's memory; None: the server's setting
    devices: tuple[tuple[str, ...], ...] = ()  # one list per replica, ranks in (pp, tp) order; (): chosen at start

    def __post_init__(self) -> None:
        self._coerce()
        for name in ("tp", "pp", "count", "chunk_tokens", "max_batch_tokens"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise PlanError(f"{name} = {value!r}: must be a whole number of at least 1")
        if self.role is not Role.COLOCATED and (self.policy or self.chunk_tokens):
            key = "policy" if self.policy else "chunk_tokens"
            raise PlanError(f'{key} belongs to role = "colocated", not to "{self.role}": remove it')
        if self.policy is Policy.PREFILL_FIRST and self.chunk_tokens:
            raise PlanError('chunk_tokens has no meaning with policy = "prefill-first" (whole prompts): remove one')
        if self.devices:
            self._check_devices()

    def _coerce(self) -> None:
        """Accepts what TOML can hold (strings, lists, bare device numbers) and stores it in this class's types."""
        put = object.__setattr__
        put(self, "role", _word(Role, "role", self.role))
        if self.policy is not None:
            put(self, "policy", _word(Policy, "policy", self.policy))
        if self.kv_memory is not None:
            try:
                put(self, "kv_memory", parse_memory(self.kv_memory))
            except UsageError as error:
                raise PlanError(f"kv_memory: {error}") from None
        put(self, "devices", tuple(_device_names(replica) for replica in _list("devices", self.devices)))

    def _check_devices(self) -> None:
        if len(self.devices) != self.count:
            raise PlanError(
                f"devices names {len(self.devices)} replicas but count = {self.count}: give one list per replica"
            )
        for replica in self.devices:
            if len(replica) != self.num_ranks:
                raise PlanError(
                    f"devices = {list(replica)}: a replica with tp = {self.tp} and pp = {self.pp} has {self.num_ranks} "
                    f"ranks, so name {self.num_ranks}"
                )

    @property
    def num_ranks(self) -> int:
        """Devices of one replica."""
        return self.tp * self.pp


@dataclass(frozen=True, slots=True)
class Replica:
    """One instance to start: a spec's settings under a name of its own."""

    name: str  # "prefill-0"; counted through all specs of the role
    spec: InstanceSpec
    devices: tuple[str, ...] = ()  # of its ranks; (): chosen at start

    @property
    def role(self) -> Role:
        return self.spec.role


@dataclass(frozen=True, slots=True)
class Plan:
    """The instances that serve one model."""

    instances: tuple[InstanceSpec, ...]
    model: str | None = None  # folder, .gguf, hub id or alias; None: named on the command line
    device: str | None = None  # "cpu", "cuda" or a name of the device catalogue; None: what the machine has
    machine: str | None = None  # fingerprint of the one that its costs were measured on; None: of none in particular

    def __post_init__(self) -> None:
        object.__setattr__(self, "instances", tuple(self.instances))
        for key in ("model", "device", "machine"):
            value = getattr(self, key)
            if value is not None and (not isinstance(value, str) or not value):
                raise PlanError(f"{key} = {value!r}: must be a non-empty string, or left out")
        roles = {spec.role for spec in self.instances}
        if not roles:
            raise PlanError(
                'the plan has no instances: add [[instances]] with role = "prefill", "decode" or "colocated"'
            )
        for has, lacks in ((Role.PREFILL, Role.DECODE), (Role.DECODE, Role.PREFILL)):
            if has in roles and lacks not in roles:
                raise PlanError(
                    f'the plan has {has} but no {lacks} instances: add [[instances]] with role = "{lacks}", '
                    f'or make them role = "colocated"'
                )
        named = [device for spec in self.instances for replica in spec.devices for device in replica]
        twice = sorted({device for device in named if named.count(device) > 1})
        if twice:
            raise PlanError(f"devices names {', '.join(twice)} more than once: a device holds one rank")

    @property
    def num_devices(self) -> int:
        """Devices when each rank has its own."""
        return sum(spec.num_ranks * spec.count for spec in self.instances)

    def replicas(self) -> tuple[Replica, ...]:
        """Every instance, named by role and number, in the plan's order."""
        counts = dict.fromkeys(Role, 0)
        found = []
        for spec in self.instances:
            for i in range(spec.count):
                name = f"{spec.role}-{counts[spec.role]}"
                counts[spec.role] += 1
                found.append(Replica(name, spec, spec.devices[i] if spec.devices else ()))
        return tuple(found)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads a plan file. Raises `PlanError` naming the file, the value and the cure."""
        return cls.from_toml(toml_file.read_text(path, "plan"), str(path))

    @classmethod
    def from_toml(cls, text: str, source: str = "plan") -> Plan:
        """Parses the format of docs/reference/plan.md; `source` opens each error."""
        table = toml_file.parse(text, source)
        try:
            toml_file.check_keys(table, [field.name for field in fields(cls)])
            entries = table.pop("instances", [])
            if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
                raise PlanError("instances must be an array of tables: write [[instances]] above each")
            return cls(tuple(_spec(entry, i) for i, entry in enumerate(entries, 1)), **table)
        except PlanError as error:
            raise PlanError(f"{source}: {error}") from None

    def to_toml(self) -> str:
        """The plan as a file; what stands at its default is left out. `from_toml` gives an equal plan back."""
        keys = ("model", "device", "machine")
        lines = [f"{key} = {_toml(value)}" for key in keys if (value := getattr(self, key)) is not None]
        for spec in self.instances:
            lines += ["", "[[instances]]"] if lines else ["[[instances]]"]
            always = ("role", "tp", "pp", "count")
            for field in fields(spec):
                value = getattr(spec, field.name)
                if field.name in always or value != field.default:
                    lines.append(f"{field.name} = {_toml(value)}")
        return "\n".join(lines) + "\n"


def _spec(entry: Mapping[str, Any], number: int) -> InstanceSpec:
    where = f"instances[{number}]"
    try:
        toml_file.check_keys(entry, [field.name for field in fields(InstanceSpec)])
        if "role" not in entry:
            raise PlanError('role is missing: one of "prefill", "decode", "colocated"')
        return InstanceSpec(**entry)
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from None


def _word(kind: type[_Word], key: str, value: Any) -> _Word:
    try:
        return kind(value)
    except ValueError:
        known = [str(member) for member in kind]
        close = difflib.get_close_matches(str(value), known, 1)
        cure = f'did you mean "{close[0]}"?' if close else "one of " + ", ".join(f'"{word}"' for word in known)
        raise PlanError(f"{key} = {json.dumps(value, default=str)} is unknown: {cure}") from None


def _list(what: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise PlanError(
            f'{what} has {value!r} for a list: write one list per replica, such as [["node0:0", "node0:1"]]'
        )
    return value


def _device_names(replica: Any) -> tuple[str, ...]:
    """Device names in one spelling, "node0:3"; a bare number is a device of node0."""
    names = []
    for device in _list("devices", replica):
        found = _DEVICE.fullmatch(str(device)) if not isinstance(device, bool) else None
        if found is None:
            raise PlanError(f'devices names {device!r}: write the node and the number of the device, such as "node0:1"')
        names.append(f"{found['node'] or 'node0'}:{int(found['index'])}")
    return tuple(names)


def _toml(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    # JSON's numbers and strings are TOML's, but for DEL (bare in JSON) and surrogate pairs (not escaped in TOML)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def default_plan(model: str | None = None, device: str | None = None) -> Plan:
    """One prefill and one decode instance.

    So also on a machine with a single device, which the two then share: the path is the same, only slower, and
    `placement.place` says so.
    """
    return Plan((InstanceSpec(Role.PREFILL), InstanceSpec(Role.DECODE)), model, device)
