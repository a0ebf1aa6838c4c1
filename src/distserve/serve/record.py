"""`serve --record FILE`: when requests came, how long they were and what became of them; never what they said.

The file is a workload (`traces.py`): simulate, plan and bench take it, so that yesterday's traffic can be tried on
another plan. A row is written when its request is over, so rows are in the order of endings; the reader sorts them.
Knows no gateway.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from distserve import metrics
from distserve.errors import OverloadedError, UnavailableError, UsageError
from distserve.request import FinishReason, Request
from distserve.serve.rows import LEAST, Later, Rows

SUFFIXES = (".csv", ".jsonl")
HEADER = "arrival,prompt_tokens,output_tokens,ttft,tpot,status,max_tokens\n"
LIMIT = 64 << 20  # bytes of a file: about a million requests


class Ended(Protocol):
    """A request that is over (`RequestStream`)."""

    @property
    def request(self) -> Request: ...
    @property
    def first(self) -> float: ...  # when its first and last token came, on the clock of `request.arrival`; 0.0: none
    @property
    def last(self) -> float: ...
    @property
    def finish(self) -> FinishReason | None: ...  # why it ended well
    @property
    def error(self) -> Exception | None: ...


def recording(path: Path | None, limit: int | None, *, clock: Callable[[], float]) -> Recorder | Deaf:
    """What `serve --record` asked for, in the running event loop. Raises `UsageError`."""
    if path is None:
        return Deaf()
    return Recorder(path, later=asyncio.get_running_loop().call_later, clock=clock, limit=limit or LIMIT)


class Deaf:
    """Records nothing."""

    def note(self, stream: Ended) -> None: ...

    def close(self) -> None: ...


def check(path: Path, limit: int) -> None:
    """Raises `UsageError` where the file could not be written as told."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--record {path}: name a file that ends in {' or '.join(SUFFIXES)}")
    if limit < LEAST:
        raise UsageError(f"--record-size {limit} is too small: at least {LEAST} bytes")


class Recorder:
    """Appends to `path`; together with its predecessor the file never takes more than twice `limit` bytes.

    `clock` is the clock of arrivals; they are written as seconds since 1970, so that files of several starts can be
    put together."""

    def __init__(self, path: Path, *, later: Later, clock: Callable[[], float], limit: int = LIMIT) -> None:
        """Raises `UsageError` where the file cannot be opened."""
        check(path, limit)
        self._csv = path.suffix.lower() == ".csv"
        self._rows = Rows("--record", path, HEADER if self._csv else "", later=later, limit=limit)
        self._since = time.time() - clock()  # read once: a clock that is set must not reorder requests

    def note(self, stream: Ended) -> None:
        """A request is over, well or not."""
        if self._rows.open:
            self._rows.add(self._row(stream))

    def flush(self) -> None:
        """All rows into the file."""
        self._rows.flush()

    def close(self) -> None:
        """Nothing more is recorded."""
        self._rows.close()

    def _row(self, stream: Ended) -> str:
        request = stream.request
        arrival = request.arrival + self._since
        prompt, output = len(request.prompt), len(request.output)
        ttft = stream.first - request.arrival if stream.first else None
        tpot = metrics.tpot(stream.first, stream.last, output)
        status, most = _status(stream), request.sampling.max_tokens
        none = "" if self._csv else "null"
        first, each = (none if value is None else f"{value:.6f}" for value in (ttft, tpot))
        if self._csv:
            return f"{arrival:.6f},{prompt},{output},{first},{each},{status},{most}\n"
        return (
            f'{{"arrival": {arrival:.6f}, "prompt_tokens": {prompt}, "output_tokens": {output}, "ttft": {first}, '
            f'"tpot": {each}, "status": "{status}", "max_tokens": {most}}}\n'
        )


def _status(stream: Ended) -> str:
    if stream.finish is not None:
        return metrics.OK
    if stream.error is None:
        return metrics.CANCELLED
    if isinstance(stream.error, OverloadedError):
        return metrics.REFUSED
    return metrics.UNAVAILABLE if isinstance(stream.error, UnavailableError) else metrics.SERVER_ERROR
