"""`serve --record FILE`: when requests came, how long they were and what became of them; never what they said.

The file is a workload (`traces.py`): simulate, plan and bench take it, so that yesterday's traffic can be tried on
another plan. A row is written when its request is over, so rows are in the order of endings; the reader sorts them.

    note() --a row--> buffer --every second, or when it is large--> FILE --when it is full--> renamed FILE.1, a new FILE

Rows leave in whole lines by one write each time: whatever kills the server, the file can be read, and lacks at most the
last second. Knows no gateway.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from distserve import metrics
from distserve.errors import OverloadedError, UnavailableError, UsageError
from distserve.request import FinishReason, Request

log = logging.getLogger(__name__)

SUFFIXES = (".csv", ".jsonl")
HEADER = "arrival,prompt_tokens,output_tokens,ttft,tpot,status,max_tokens\n"
LIMIT = 64 << 20  # bytes of a file: about a million requests
LEAST = 4096  # bytes below which a limit makes no sense
INTERVAL = 1.0  # seconds after which rows are in the file at the latest
_BUFFER = 64 << 10  # bytes of rows that do not wait for the interval

Later = Callable[[float, Callable[[], None]], object]  # calls back after so many seconds: loop.call_later


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
    put together. A disk that says no ends the recording, with a warning, and nothing else."""

    def __init__(self, path: Path, *, later: Later, clock: Callable[[], float], limit: int = LIMIT) -> None:
        """Raises `UsageError` where the file cannot be opened."""
        check(path, limit)
        self.path = path
        self.predecessor = path.with_suffix(f".1{path.suffix}")
        self._limit = limit
        self._later = later
        self._since = time.time() - clock()  # read once: a clock that is set must not reorder requests
        self._csv = path.suffix.lower() == ".csv"
        self._rows: list[str] = []
        self._waiting = 0  # bytes of them
        self._armed = False
        self._file: int | None = None
        try:
            _mend(path)
            self._size = self._open()
        except OSError as error:
            raise UsageError(f"--record {path}: cannot be written: {error.strerror}") from None

    def note(self, stream: Ended) -> None:
        """A request is over, well or not."""
        if self._file is None:
            return
        row = self._row(stream)
        self._rows.append(row)
        self._waiting += len(row)
        if self._waiting >= _BUFFER:
            self.flush()
        elif not self._armed:
            self._armed = True
            self._later(INTERVAL, self._timer)

    def flush(self) -> None:
        """All rows into the file."""
        rows, self._rows, self._waiting = "".join(self._rows), [], 0
        if self._file is None or not rows:
            return
        try:
            if self._size + len(rows) > self._limit and self._size > self._empty:
                self._rotate()
            _write(self._file, rows)
            self._size += len(rows)
        except OSError as error:
            log.warning("--record %s: %s; the recording ends here, serving goes on", self.path, error.strerror)
            os.ftruncate(self._file, self._size)  # no torn line stays behind
            os.close(self._file)
            self._file = None

    def close(self) -> None:
        """Nothing more is recorded."""
        self.flush()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _rotate(self) -> None:
        assert self._file is not None
        full = self._file
        os.replace(self.path, self.predecessor)
        self._size = self._open()
        os.close(full)

    @property
    def _empty(self) -> int:
        return len(HEADER) if self._csv else 0

    def _timer(self) -> None:
        self._armed = False
        self.flush()

    def _open(self) -> int:
        """Opens the file and returns its size in bytes."""
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        size = os.fstat(self._file).st_size
        if self._csv and not size:
            _write(self._file, HEADER)
            size = len(HEADER)
        return size

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


def _write(file: int, text: str) -> None:
    """All of it; a regular file takes it in one call unless the disk is full."""
    data = text.encode("ascii")
    while data:
        data = data[os.write(file, data) :]


def _mend(path: Path) -> None:
    """Cuts off a last line that a power failure left without its end."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - LEAST))
        tail = file.read()
        if tail and not tail.endswith(b"\n"):
            file.truncate(size - len(tail) + tail.rfind(b"\n") + 1)
