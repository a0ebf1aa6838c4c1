"""Work on several cores: small questions to functions of this package, in processes that know the situation. Knows
neither what is asked nor what the answers mean."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

Answer = TypeVar("Answer")

_context: Any = None  # in a worker: what its functions are asked about
_stop: Any = None  # in a worker: an event that says that nobody waits for the answer any more


class Jobs:
    """`with Jobs(context, 2) as jobs: jobs.map(function, questions)`: `function(context, question)` for each, answers
    in order. With one process (or one question at a time) nothing is started."""

    def __init__(self, context: Any, processes: int = 1) -> None:
        self._context = context
        self._processes = processes
        self._pool: ProcessPoolExecutor | None = None
        self._event: Any = None

    def __enter__(self) -> Jobs:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._pool is not None:
            if kind is not None:
                self._event.set()
            self._pool.shutdown(wait=True, cancel_futures=True)

    def map(self, function: Callable[[Any, Any], Answer], questions: Sequence[Any]) -> list[Answer]:
        return self.gather([(function, question) for question in questions])

    def gather(self, calls: Sequence[tuple[Callable[[Any, Any], Any], Any]]) -> list[Any]:
        """The answers of different functions, in order."""
        if self._processes == 1 or (self._pool is None and len(calls) < 2):
            return [self._here(function, question) for function, question in calls]
        pool = self._started()
        pending = [pool.submit(_call, function, question) for function, question in calls]
        return [future.result() for future in pending]

    def _here(self, function: Callable[[Any, Any], Answer], question: Any) -> Answer:
        return function(self._context, question)

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            spawning = multiprocessing.get_context("spawn")
            self._event = spawning.Event()
            with _without_main():
                self._pool = ProcessPoolExecutor(
                    self._processes, spawning, initializer=_begin, initargs=(self._context, self._event)
                )
                for _ in range(self._processes):  # each starts one process
                    self._pool.submit(_nothing)
        return self._pool


def cancelled() -> bool:
    """In a worker: whether nobody waits for the answer."""
    return _stop is not None and bool(_stop.is_set())


def _begin(context: Any, stop: Any) -> None:
    global _context, _stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's to hear
    _context, _stop = context, stop


def _call(function: Callable[[Any, Any], Answer], question: Any) -> Answer:
    return function(_context, question)


def _nothing() -> None:
    pass


@contextmanager
def _without_main() -> Iterator[None]:
    """Processes that start here do not import the user's script again: what they call is all in this package, and a
    script without `if __name__ == "__main__"` would plan in each of them."""
    main = sys.modules["__main__"]
    hidden = {name: getattr(main, name) for name in ("__file__", "__spec__") if hasattr(main, name)}
    try:
        if "__file__" in hidden:
            del main.__file__
        main.__spec__ = None
        yield
    finally:
        for name, value in hidden.items():
            setattr(main, name, value)
