"""A file that grows by rows: bounded, whole after whatever kills the server, and never in anybody's way.

    add() --a row--> buffer --every second, or when it is large--> FILE --when it is full--> renamed FILE.1, a new FILE

Rows leave in whole lines by one write each time: a file that is left behind can be read, and lacks at most the last
second. Knows nothing of what a row says.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from distserve.errors import UsageError

log = logging.getLogger(__name__)

LEAST = 4096  # bytes below which a limit makes no sense
INTERVAL = 1.0  # seconds after which rows are in the file at the latest
_BUFFER = 64 << 10  # bytes of rows that do not wait for the interval

Later = Callable[[float, Callable[[], None]], object]  # calls back after so many seconds: loop.call_later


class Rows:
    """Appends to `path`; together with its predecessor the file never takes more than twice `limit` bytes.

    A disk that says no ends the recording, with a warning, and nothing else. `option` is named in messages."""

    def __init__(self, option: str, path: Path, header: str, *, later: Later, limit: int) -> None:
        """Raises `UsageError` where the file cannot be opened."""
        self.path = path
        self.predecessor = path.with_suffix(f".1{path.suffix}")
        self._option = option
        self._header = header
        self._limit = limit
        self._later = later
        self._rows: list[str] = []
        self._waiting = 0  # bytes of them
        self._armed = False
        self._file: int | None = None
        try:
            _mend(path)
            self._size = self._open()
        except OSError as error:
            raise UsageError(f"{option} {path}: cannot be written: {error.strerror}") from None

    @property
    def open(self) -> bool:
        """Whether rows still go anywhere."""
        return self._file is not None

    def add(self, row: str) -> None:
        """A whole line, in ASCII."""
        if self._file is None:
            return
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
            if self._size + len(rows) > self._limit and self._size > len(self._header):
                self._rotate()
            _write(self._file, rows)
            self._size += len(rows)
        except OSError as error:
            log.warning("%s %s: %s; the recording ends here, serving goes on", self._option, self.path, error.strerror)
            os.ftruncate(self._file, self._size)  # no torn line stays behind
            os.close(self._file)
            self._file = None

    def close(self) -> None:
        """Nothing more is written."""
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

    def _timer(self) -> None:
        self._armed = False
        self.flush()

    def _open(self) -> int:
        """Opens the file and returns its size in bytes."""
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        size = os.fstat(self._file).st_size
        if not size:
            _write(self._file, self._header)
            size = len(self._header)
        return size


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
