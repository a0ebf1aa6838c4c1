"""Files that say which requests came when. Reads ours and the public traces; knows nothing of what they are for.

    ours       CSV or JSONL   arrival (s, optional), prompt_tokens, output_tokens, app (optional); other columns ignored
    recorded   CSV or JSONL   the same and status, max_tokens (optional): what `serve --record`, `--requests-out` write
    Mooncake   JSONL or CSV   timestamp (ms), input_length, output_length
    Azure      CSV or JSONL   TIMESTAMP (date and time), ContextTokens, GeneratedTokens

Our own files are taken at their word or refused. Traces are recordings of real systems: what cannot be replayed as
recorded (rows out of order, answers of no token) is mended, and `notes` says so. Of a request that was refused, or
failed before its answer began, nobody knows how long the answer would have been: it is given the mean length of those
that are known, but no more than it asked for. Any of them may be gzipped.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from distserve.errors import WorkloadError


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a workload. Raises `WorkloadError` on values that no request can have."""

    arrival: float  # seconds; 0 where the workload has no times
    prompt_tokens: int
    output_tokens: int
    app: str = ""  # which application sent it, where the file says so

    def __post_init__(self) -> None:
        if not (math.isfinite(self.arrival) and self.arrival >= 0):
            raise WorkloadError(f"arrival {self.arrival} must be a finite number of seconds, 0 or more")
        for name in ("prompt_tokens", "output_tokens"):
            if getattr(self, name) < 1:
                raise WorkloadError(f"{name} {getattr(self, name)} must be at least 1")


@dataclass(frozen=True, slots=True)
class Trace:
    """What a file held, in order of arrival."""

    arrivals: tuple[Arrival, ...]
    timed: bool  # it has arrival times
    notes: tuple[str, ...] = ()  # what was mended, a sentence each


@dataclass(frozen=True, slots=True)
class _Format:
    """The columns of one kind of file."""

    name: str
    arrival: str
    prompt: str
    output: str
    time: Callable[[object], float]  # reads the arrival column, to seconds; raises ValueError
    recorded: bool  # mend rather than refuse
    absolute: bool = False  # times are dates: the first becomes 0
    quiet: bool = False  # rows are out of order as a rule: no word about it


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    return float(value)


def _date(value: object) -> float:
    try:
        return datetime.fromisoformat(str(value).strip()).timestamp()
    except ValueError:
        return _seconds(value)  # some copies of the traces count seconds


_OURS = _Format("distserve", "arrival", "prompt_tokens", "output_tokens", _seconds, recorded=False)
_RECORDED = replace(_OURS, recorded=True, absolute=True, quiet=True)  # rows are in the order in which requests ended
_FORMATS = (
    _OURS,
    _Format("Mooncake", "timestamp", "input_length", "output_length", lambda v: _seconds(v) / 1000, recorded=True),
    _Format("Azure", "TIMESTAMP", "ContextTokens", "GeneratedTokens", _date, recorded=True, absolute=True),
)


def read(path: Path) -> Trace:
    """Raises `WorkloadError` naming the file, the line, the value and the cure."""
    return parse(_text(path), str(path))


def parse(text: str, source: str) -> Trace:
    """`read`, of a text that is already here; `source` opens each error."""
    rows = _json_rows(text, source) if text.lstrip().startswith(("{", "[")) else _csv_rows(text, source)
    first = next(rows, None)
    if first is None:
        raise WorkloadError(f"{source}: no requests: give at least one below the line of column names")
    shape = _format(first[1], source)
    if shape is _OURS and "status" in first[1]:
        shape = _RECORDED
    timed = first[1].get(shape.arrival) is not None
    found: list[Arrival] = []
    limits: dict[int, int] = {}  # by place: tokens that an answer of unknown length may have
    num_raised = num_late = 0
    for line, row in _chain(first, rows):
        try:
            time = _time(row, shape) if timed else 0.0
            prompt, output = _count(row, shape.prompt), _count(row, shape.output)
            if output == 0 and row.get("status") not in (None, "ok"):
                limits[len(found)] = _count(row, "max_tokens") if row.get("max_tokens") is not None else sys.maxsize
                output = 1
            elif shape.recorded and min(prompt, output) == 0:
                num_raised += 1
            if shape.recorded:
                prompt, output = max(prompt, 1), max(output, 1)
            request = Arrival(time, prompt, output, str(row.get("app") or ""))
        except WorkloadError as error:
            raise WorkloadError(f"{source}:{line}: {error}; correct the line or remove it") from None
        if found and time < found[-1].arrival:
            num_late += 1
            if not shape.recorded:
                raise WorkloadError(
                    f"{source}:{line}: arrival {time:g} is before the one above it ({found[-1].arrival:g}): "
                    "sort the file by arrival"
                )
        found.append(request)
    notes = _give_lengths(found, limits)
    if num_raised:
        notes.append(f"{num_raised} of {len(found)} requests had 0 tokens of prompt or answer; they count as 1")
    if num_late:
        found.sort(key=lambda request: request.arrival)
        if not shape.quiet:
            notes.append(f"{num_late} of {len(found)} requests were out of order; they are sorted by arrival")
    if shape.absolute and (origin := found[0].arrival):
        found = [replace(request, arrival=request.arrival - origin) for request in found]
    return Trace(tuple(found), timed, tuple(notes))


def _give_lengths(found: list[Arrival], limits: Mapping[int, int]) -> list[str]:
    """Answers of unknown length, at these places, get the mean of the others; returns what to say about it."""
    known = [request.output_tokens for place, request in enumerate(found) if place not in limits]
    if not limits or not known:
        return []
    mean = max(1, round(sum(known) / len(known)))
    for place, limit in limits.items():
        found[place] = replace(found[place], output_tokens=min(mean, max(1, limit)))
    note = f"{len(limits)} of {len(found)} requests were not answered; they are taken to want the mean of {mean} tokens"
    return [f"{note}, or as few as they asked for"]


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        return data.decode("utf-8-sig")
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise WorkloadError(f"{path}: damaged gzip file: fetch it again") from None
    except UnicodeDecodeError:
        raise WorkloadError(f"{path}: not a text file (UTF-8): give CSV or JSONL, plain or gzipped") from None
    except OSError as error:
        raise WorkloadError(f"cannot read the workload {path}: {error.strerror}") from None


_Row = tuple[int, Mapping[str, Any]]  # line number, values by column


def _csv_rows(text: str, source: str) -> Iterator[_Row]:
    # skipinitialspace and strip: people write "a, b"
    reader = csv.DictReader(io.StringIO(text), skipinitialspace=True, strict=True)
    try:
        if reader.fieldnames is not None:
            reader.fieldnames = [name.strip() for name in reader.fieldnames]
        for row in reader:
            yield reader.line_num, {name: value or None for name, value in row.items() if isinstance(name, str)}
    except csv.Error as error:
        raise WorkloadError(f"{source}:{reader.line_num}: not CSV: {error}") from None


def _json_rows(text: str, source: str) -> Iterator[_Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise WorkloadError(f"{source}:{number}: not a JSON object: write one object a line (JSONL)")
            yield number, row


def _chain(first: _Row, rest: Iterator[_Row]) -> Iterator[_Row]:
    yield first
    yield from rest


def _format(row: Mapping[str, Any], source: str) -> _Format:
    for shape in _FORMATS:
        if shape.prompt in row and shape.output in row:
            return shape
    known = "; or ".join(f"{shape.arrival}, {shape.prompt}, {shape.output} ({shape.name})" for shape in _FORMATS)
    have = ", ".join(map(str, row)) or "none"
    raise WorkloadError(f"{source}: columns {have[:200]} are of no known format: name them {known}")


def _time(row: Mapping[str, Any], shape: _Format) -> float:
    value = row.get(shape.arrival)
    try:
        time = shape.time(value)
    except (ValueError, OverflowError, OSError):
        raise WorkloadError(f"{shape.arrival} {_shown(value)} is no time") from None
    if not (math.isfinite(time) and time >= 0):
        raise WorkloadError(f"{shape.arrival} {_shown(value)} must be finite and 0 or more")
    return time


def _count(row: Mapping[str, Any], column: str) -> int:
    value = row.get(column)
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not (math.isfinite(number) and number.is_integer() and number >= 0):
        raise WorkloadError(f"{column} {_shown(value)} must be a whole number of tokens, at least 1")
    return int(number)


def _shown(value: object) -> str:
    return "is missing, it" if value is None else repr(value)[:60]
