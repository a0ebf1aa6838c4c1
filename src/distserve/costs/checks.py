"""Values of parsed JSON, checked. Knows no format: it is told the place, the keys and the limits, and says what is
wrong in one line."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

Kind = TypeVar("Kind")
HUGE = 1e300  # JSON's whole numbers may be larger than any float


class Wrong(Exception):
    """A mistake, in words: the place, the value, the limit and the cure, without the file's name."""


def mapping(where: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise Wrong(f"{where} is {show(value)}: must be a JSON object")
    return value


def keys(where: str, value: Any, known: Sequence[str], needed: Sequence[str] = ()) -> Mapping[str, Any]:
    """An object that has no other keys than these."""
    table = mapping(where, value)
    for key in table:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            cure = f"did you mean {close[0]!r}?" if close else f"use {', '.join(known)}"
            raise Wrong(f"{where}: unknown key {key!r}: {cure}")
    if missing := [key for key in needed if key not in table]:
        raise Wrong(f"{where}: {', '.join(missing)} missing")
    return table


def rows(where: str, table: Mapping[str, Any], key: str) -> list[tuple[str, Any]]:
    """(place, row) of a list that may be missing, but not empty."""
    value = table.get(key, [])
    if not isinstance(value, list) or (key in table and not value):
        raise Wrong(f"{where}: {key} = {show(value)}: must be a list, of one row at least")
    return [(f"{where}: {key}[{i}]", row) for i, row in enumerate(value, 1)]


def parts(where: str, row: Any, names: Sequence[str]) -> list[Any]:
    if not isinstance(row, list) or len(row) != len(names):
        raise Wrong(f"{where} is {show(row)}: must be [{', '.join(names)}]")
    return row


def number(where: str, value: Any, least: float = 0.0) -> float:
    """Finite, and not below `least`."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and -HUGE < value < HUGE
    if not good or value < least:
        limit = f", {least:g} or above" if math.isfinite(least) else ""
        raise Wrong(f"{where} = {show(value)}: must be a finite number{limit}")
    return float(value)


def whole(where: str, value: Any, least: int = 1) -> int:
    if type(value) is not int or value < least:
        raise Wrong(f"{where} = {show(value)}: must be a whole number, {least} or above")
    return value


def seconds(where: str, value: Any) -> float:
    if not number(f"{where}: seconds", value):
        raise Wrong(f"{where}: seconds = {show(value)}: must be above 0")
    return float(value)


def overlay(where: str, base: Kind, value: Any, zero: Sequence[str] = ()) -> Kind:
    """The dataclass with what the object says instead, checked by the annotations: whole numbers are 1 or above (0 in
    the fields named by `zero`), others 0 or above, and those that may be missing (None) above 0."""
    assert is_dataclass(base)
    hints = get_type_hints(type(base))
    table = keys(where, value, [field.name for field in fields(base)])
    changes = {key: _typed(f"{where}: {key}", hints[key], getattr(base, key), table[key], zero) for key in table}
    return replace(base, **changes)  # type: ignore[type-var]  # a dataclass, says the assertion


def _typed(where: str, hint: Any, base: Any, value: Any, zero: Sequence[str]) -> Any:
    if is_dataclass(hint):
        return overlay(where, base, value)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise Wrong(f"{where} = {show(value)}: must be one of {', '.join(map(repr, get_args(hint)))}")
        return value
    kinds = get_args(hint) or (hint,)
    if NoneType in kinds and value is None:
        return None
    if bool in kinds or str in kinds:
        kind = bool if bool in kinds else str
        if not isinstance(value, kind):
            raise Wrong(f"{where} = {show(value)}: must be {'true or false' if kind is bool else 'a string'}")
        return value
    if int in kinds:
        return whole(where, value, 0 if where.endswith(tuple(f": {name}" for name in zero)) else 1)
    found = number(where, value)
    if NoneType in kinds and not found:
        raise Wrong(f"{where} = {show(value)}: must be above 0, or null")
    return found


def show(value: Any) -> str:
    written = json.dumps(value, default=str)
    return written if len(written) <= 60 else f"{written[:57]}..."
