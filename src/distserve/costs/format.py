"""The format of a costs file: JSON in, checked values out, and back. docs/reference/costs.md describes it for people.
Knows no model's shape and no device: whether a file fits these is asked in `profile.py`.

Every mistake is a `UsageError` of one line: the file, the place in it, the value, the limit, the cure.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from distserve.costs import fit
from distserve.costs.base import FAIR, Engine, Pace, Weather
from distserve.costs.checks import Wrong, keys, mapping, number, overlay, parts, rows, seconds, show, whole
from distserve.costs.fit import DecodePoint, Error, MixedPoint, PromptPoint
from distserve.costs.latency import Coefficients, DecodeLine, PrefillLine
from distserve.costs.memory import DISTSERVE, Accounting
from distserve.errors import UsageError
from distserve.specs import DTYPE_BYTES

FORMAT = 1
LEAST_PACE = 0.5  # times as long as measured: steps can hardly take less
TOLERANCE = 1e-6  # between the fit error that a file states and the one that its points have
ACCOUNTINGS = {"own": Accounting(), "paper": DISTSERVE}
_KEYS = ("format", "device", "dtype", "date", "source", "note", "machine", "accounting", "engine", "weather", "models")
_ENTRY = ("prefill", "decode", "prefill_points", "decode_points", "mixed_points", "mixed_added", "error", "measured_to")
_DATE = re.compile(r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])")
_DEGREE = re.compile(r"(?P<tp>[1-9]\d*)(x(?P<pp>[1-9]\d*))?")
_MAY_BE_ZERO = ("watermark_blocks", "layer_vectors")  # of whole numbers


@dataclass(frozen=True, slots=True)
class Machine:
    """Where it was measured. `memory` and `link_bandwidth` are needed where the catalogue does not know the device."""

    name: str = ""
    fingerprint: str = ""  # `machine.fingerprint`: costs are of no use on machines that have another
    versions: str = ""  # of the software that computed
    memory: int | None = None  # bytes of a device
    link_bandwidth: float | None = None  # bytes/s between two devices of a node, one direction
    network_bandwidth: float | None = None  # bytes/s between nodes


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest that was measured."""

    prompt_tokens: int  # in a step
    batch: int  # sequences in a step that decodes
    context: int  # tokens, summed over it


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of one model at one parallelism."""

    coefficients: Coefficients
    measured_to: Limits | None = None  # None: nobody says
    prefill_error: Error | None = None
    decode_error: Error | None = None
    mixed_error: Error | None = None


Degree = tuple[int, int | None]  # (tp, pp); pp None: whatever pp, stages sharing the seconds by their layers


@dataclass(frozen=True, slots=True)
class Contents:
    """A file."""

    device: str
    dtype: str
    date: str
    source: str
    note: str
    machine: Machine
    engine: Engine
    accounting: Accounting
    entries: Mapping[str, Mapping[Degree, Entry]]  # by model


def read(table: Any, name: str) -> Contents:
    """Of parsed JSON; `name` is how errors call the file."""
    try:
        return _contents(table)
    except Wrong as error:
        raise UsageError(f"costs {name}: {error}") from None


def text(table: Mapping[str, Any]) -> str:
    """JSON that a human can diff: a line for each key, and for each row of a list."""
    return _written(table, "") + "\n"


def _written(value: Any, indent: str) -> str:
    inner = indent + " "
    if isinstance(value, dict) and value:
        items = [f"{json.dumps(key)}: {_written(each, inner)}" for key, each in value.items()]
        return f"{{\n{inner}" + f",\n{inner}".join(items) + f"\n{indent}}}"
    if isinstance(value, list) and value:
        items = [json.dumps(each, allow_nan=False) for each in value]
        return f"[\n{inner}" + f",\n{inner}".join(items) + f"\n{indent}]"
    return json.dumps(value, allow_nan=False)


def fitted(
    prompts: Sequence[PromptPoint],
    decodes: Sequence[DecodePoint],
    mixed: Sequence[MixedPoint] = (),
    *,
    padded: bool = False,
) -> dict[str, Any]:
    """The entry of a costs file for measured points: the points, their fit and its error. Raises `UsageError` where
    there are fewer than `fit.FEWEST` of a kind."""
    found = fit.fit(prompts, decodes, padded=padded)
    errors = {"prefill": fit.prefill_left_out(prompts, padded), "decode": fit.decode_left_out(decodes)}
    if mixed:
        found = replace(found, mixed_added=fit.mixed_added(mixed, found))
        errors["mixed"] = fit.mixed_error(mixed, found)
    return {
        "prefill": [list(line) for line in found.prefill],
        "decode": [list(line) for line in found.decode],
        "error": {kind: asdict(error) for kind, error in errors.items()},
        "prefill_points": [[list(point.lengths), point.seconds] for point in prompts],
        "decode_points": [list(point) for point in decodes],
        **({"mixed_points": [list(point) for point in mixed], "mixed_added": found.mixed_added} if mixed else {}),
    }


def _contents(table: Any) -> Contents:
    keys("the file", table, _KEYS, needed=("format", "device", "dtype", "date", "source", "models"))
    if table["format"] != FORMAT or isinstance(table["format"], bool):
        raise Wrong(f"format = {show(table['format'])}: this version reads {FORMAT}; measure again with it")
    for key in ("device", "dtype", "date", "source", "note"):
        if not isinstance(table.get(key, ""), str):
            raise Wrong(f"{key} = {show(table[key])}: must be a string")
    if table["dtype"] not in DTYPE_BYTES:
        raise Wrong(f"dtype = {show(table['dtype'])}: must be one of {', '.join(DTYPE_BYTES)}")
    if not _DATE.fullmatch(table["date"]):
        raise Wrong(f"date = {show(table['date'])}: must be a day such as 2024-05-01")
    engine = overlay("engine", Engine(), table.get("engine", {}), _MAY_BE_ZERO)
    engine = replace(engine, weather=_weather(table["weather"]) if "weather" in table else FAIR)
    for phase in ("prefill_beside", "decode_beside"):
        for neighbour, share in asdict(getattr(engine, phase)).items():
            number(f"engine: {phase}: {neighbour}", share, least=1.0)
    accounting = dict(mapping("accounting", table.get("accounting", {})))
    base = accounting.pop("base", "own")
    if not isinstance(base, str) or base not in ACCOUNTINGS:
        raise Wrong(f"accounting: base = {show(base)}: must be one of {', '.join(ACCOUNTINGS)}")
    if "block_size" in accounting:
        raise Wrong("accounting: block_size belongs to the engine: move it there")
    entries = {
        model: _entries(f"models: {model}", by_degree, engine.padded)
        for model, by_degree in mapping("models", table["models"]).items()
    }
    if not entries:
        raise Wrong("models is empty: name a model at least")
    return Contents(
        device=table["device"],
        dtype=table["dtype"],
        date=table["date"],
        source=table["source"],
        note=table.get("note", ""),
        machine=overlay("machine", Machine(), table.get("machine", {})),
        engine=engine,
        accounting=replace(
            overlay("accounting", ACCOUNTINGS[base], accounting, _MAY_BE_ZERO), block_size=engine.block_size
        ),
        entries=entries,
    )


def _weather(table: Any) -> Weather:
    keys("weather", table, ("span", "paces"), needed=("span", "paces"))
    paces = []
    for at, row in rows("weather", table, "paces"):
        parts(at, row, Pace._fields)
        paces.append(
            Pace(
                number(f"{at}: at", row[0]),
                *(
                    number(f"{at}: {phase}", x, least=LEAST_PACE)
                    for phase, x in zip(Pace._fields[1:], row[1:], strict=True)
                ),
            )
        )
    times = [pace.at for pace in paces]
    if times[0] != 0 or sorted(set(times)) != times:
        raise Wrong("weather: paces begin at other times than 0 and then later and later: measure again")
    span = number("weather: span", table["span"])
    if span <= times[-1]:
        raise Wrong(f"weather: span = {span:g}: must be above {times[-1]:g}, when its last pace begins")
    return Weather(tuple(paces), span)


def _entries(where: str, by_degree: Any, padded: bool) -> dict[Degree, Entry]:
    found: dict[Degree, Entry] = {}
    for key, entry in mapping(where, by_degree).items():
        degree = _DEGREE.fullmatch(key)
        if degree is None:
            raise Wrong(f"{where}: {show(key)} is no parallelism: write tp such as 2, or tp and pp such as 2x4")
        found[int(degree["tp"]), int(degree["pp"]) if degree["pp"] else None] = _entry(f"{where}: {key}", entry, padded)
    if not found:
        raise Wrong(f"{where} is empty: give a tp at least")
    return found


def _entry(where: str, entry: Any, padded: bool) -> Entry:
    keys(where, entry, _ENTRY)
    prompts = [_prompt_point(at, row) for at, row in rows(where, entry, "prefill_points")]
    decodes = [_decode_point(at, row) for at, row in rows(where, entry, "decode_points")]
    for kind, points in (("prefill", prompts), ("decode", decodes)):
        if kind not in entry and len(points) < fit.FEWEST:
            raise Wrong(f"{where}: no {kind}, and {len(points)} {kind}_points: give {fit.FEWEST} at least to fit it to")
    prefill = tuple(_prefill_line(at, row) for at, row in rows(where, entry, "prefill"))
    decode = tuple(_decode_line(at, row) for at, row in rows(where, entry, "decode"))
    mixed = [_mixed_point(at, row) for at, row in rows(where, entry, "mixed_points")]
    starts = [line.from_batch for line in decode]
    if decode and (starts[0] != 1 or sorted(set(starts)) != starts):
        raise Wrong(f"{where}: decode begins at batches {starts}: the first must be 1, each other above the one before")
    prefill = prefill or (fit.prefill_line(prompts, padded),)
    decode = decode or fit.decode_lines(decodes)
    try:
        coefficients = fit.with_rest(prefill, decode, prompts, decodes, padded=padded)
    except UsageError as error:
        raise Wrong(f"{where}: {error}") from None
    added = number(f"{where}: mixed_added", entry.get("mixed_added", fit.mixed_added(mixed, coefficients)))
    if added > 1:
        raise Wrong(f"{where}: mixed_added = {added}: must be a share, 1 at most")
    coefficients = replace(coefficients, mixed_added=added)
    return Entry(
        coefficients,
        _limits(where, entry, prompts, decodes, padded),
        _error(where, entry, "prefill", fit.prefill_error(prompts, prefill, padded) if prompts else None),
        _error(where, entry, "decode", fit.decode_error(decodes, decode) if decodes else None),
        _error(where, entry, "mixed", fit.mixed_error(mixed, coefficients) if mixed else None),
    )


def _limits(
    where: str, entry: Mapping[str, Any], prompts: Sequence[PromptPoint], decodes: Sequence[DecodePoint], padded: bool
) -> Limits | None:
    """What the file states, else what its points reach."""
    names = [field.name for field in fields(Limits)]
    if "measured_to" in entry:
        stated = entry["measured_to"]
        keys(f"{where}: measured_to", stated, names, needed=names)
        return Limits(*(whole(f"{where}: measured_to: {key}", stated[key]) for key in names))
    if not prompts or not decodes:
        return None
    return Limits(
        max(point.composition(padded)[0] for point in prompts),
        max(point.batch for point in decodes),
        max(point.context for point in decodes),
    )


def _error(where: str, entry: Mapping[str, Any], kind: str, found: Error | None) -> Error | None:
    """What the file states, if its points bear it out."""
    stated = entry.get("error", {})
    keys(f"{where}: error", stated, ("prefill", "decode", "mixed"))
    if kind not in stated:
        return found
    where, names = f"{where}: error: {kind}", [field.name for field in fields(Error)]
    keys(where, stated[kind], names, needed=("mean", "max"))
    values = {key: None if value is None else number(f"{where}: {key}", value) for key, value in stated[kind].items()}
    error = Error(**{"mean": 0.0, "max": 0.0, **values})  # type: ignore[arg-type]
    for name in ("mean", "max"):
        said, is_so = getattr(error, name), getattr(found, name) if found else None
        if said is None or (is_so is not None and abs(said - is_so) > TOLERANCE):
            raise Wrong(f"{where}: {name} = {said}, but its points differ from the formula by {is_so}: fit them again")
    return error


# -- lines and points --------------------------------------------------------------------------------------------------


def _prefill_line(where: str, row: Any) -> PrefillLine:
    """Published fits may have a negative `per_square`, which is right as far as a step grows with its prompts'
    lengths: `profile.py` knows how long these get."""
    parts(where, row, ("base", "per_token", "per_square"))
    base, per_token = (number(f"{where}: {key}", row[i]) for i, key in enumerate(("base", "per_token")))
    line = PrefillLine(base, per_token, number(f"{where}: per_square", row[2], least=-math.inf))
    if line(1, 1) <= 0:
        raise Wrong(f"{where}: a prompt of one token takes {line(1, 1)} seconds: must be above 0")
    return line


def _decode_line(where: str, row: Any) -> DecodeLine:
    names = ("from_batch", "base", "per_context", "per_sequence")
    parts(where, row, names)
    values = [number(f"{where}: {key}", value) for key, value in zip(names[1:], row[1:], strict=True)]
    if not sum(values):
        raise Wrong(f"{where}: all parts are 0: a step takes time")
    return DecodeLine(whole(f"{where}: from_batch", row[0]), *values)


def _prompt_point(where: str, row: Any) -> PromptPoint:
    parts(where, row, ("lengths", "seconds"))
    if not isinstance(row[0], list) or not row[0]:
        raise Wrong(f"{where}: lengths = {show(row[0])}: must be a list of the prompts' tokens")
    return PromptPoint(tuple(whole(f"{where}: lengths", n) for n in row[0]), seconds(where, row[1]))


def _decode_point(where: str, row: Any) -> DecodePoint:
    parts(where, row, ("batch", "context", "seconds"))
    batch, context = whole(f"{where}: batch", row[0]), whole(f"{where}: context", row[1])
    if context < batch:
        raise Wrong(f"{where}: context = {context} of {batch} sequences: each has a token at least")
    return DecodePoint(batch, context, seconds(where, row[2]))


def _mixed_point(where: str, row: Any) -> MixedPoint:
    parts(where, row, ("computed", "new", "batch", "context", "seconds"))
    computed, new, batch, context = (
        whole(f"{where}: {key}", row[i], 0 if key == "computed" else 1)
        for i, key in enumerate(("computed", "new", "batch", "context"))
    )
    if context < batch:
        raise Wrong(f"{where}: context = {context} of {batch} sequences: each has a token at least")
    return MixedPoint(computed, new, batch, context, seconds(where, row[4]))
