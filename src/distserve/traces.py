"""Files that say which requests came when. Reads ours and the public traces; knows nothing of what they are for.

    ours       CSV or JSONL   arrival (s, optional), prompt_tokens, output_tokens, app (optional); other columns ignored
    Mooncake   JSONL or CSV   timestamp (ms), input_length, output_length
    Azure      CSV or JSONL   TIMESTAMP (date and time), ContextTokens, GeneratedTokens

Our own files are taken at their word or refused. Traces are recordings of real systems: what cannot be replayed as
recorded (rows out of order, answers of no token) is mended, and `notes` says so. Any of them may be gzipped.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
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


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    return float(value)


def _date(value: object) -> float:
    try:
        return datetime.fromisoformat(str(value).strip()).timestamp()
    except ValueError:
        return _seconds(value)  # some copies of the traces count seconds


_FORMATS = (
    _Format("distserve", "arrival", "prompt_tokens", "output_tokens", _seconds, recorded=False),
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
    timed = first[1].get(shape.arrival) is not None
    found: list[Arrival] = []
    origin: float | None = None
    num_raised = num_late = 0
    for line, row in _chain(first, rows):
        try:
            time = _time(row, shape) if timed else 0.0
            if shape.absolute:
                origin = time if origin is None else min(origin, time)
            prompt, output = _count(row, shape.prompt), _count(row, shape.output)
            if shape.recorded and min(prompt, output) == 0:
                num_raised += 1
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
    return _mended(found, timed, origin or 0.0, num_raised, num_late)


def _mended(found: list[Arrival], timed: bool, origin: float, num_raised: int, num_late: int) -> Trace:
    notes = []
    if num_raised:
        notes.append(f"{num_raised} of {len(found)} requests had 0 tokens of prompt or answer; they count as 1")
    if num_late:
        notes.append(f"{num_late} of {len(found)} requests were out of order; they are sorted by arrival")
        found.sort(key=lambda request: request.arrival)
    if origin:
        found = [Arrival(r.arrival - origin, r.prompt_tokens, r.output_tokens, r.app) for r in found]
    return Trace(tuple(found), timed, tuple(notes))


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
