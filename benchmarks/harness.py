"""What every benchmark needs: quiet pinned workers, rounds that take turns, tables, and the machine's kind.

Standard library only, so that a peer's interpreter can import it too. A worker is a module run by some interpreter that
reads one JSON command a line and answers one JSON line; while it waits it uses no processor time, so several can stand
ready and be measured in turns, under the same weather.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parent.parent
OUT = ROOT / "benchmarks" / "out"
WORKER_ENV = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


class Absent(Exception):
    """A peer that cannot be measured here; the message stands in its column."""


def serve_commands(commands: dict[str, Callable[..., object]]) -> None:
    """The worker's side: answers `{"do": name, ...arguments}` from stdin until it closes.

    Answers travel on a pipe of their own: what libraries print on stdout must not come between them.
    """
    answers = os.fdopen(int(os.environ["BENCHMARK_ANSWERS"]), "w", buffering=1)
    answers.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        arguments = json.loads(line)
        try:
            answer: dict[str, object] = {"result": commands[arguments.pop("do")](**arguments)}
        except Exception as error:  # noqa: BLE001  the other side raises it again
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


class Worker:
    """One contender in a process of its own, pinned to `core` before it imports anything."""

    def __init__(
        self, module: str, *arguments: str, core: int, python: str = sys.executable, env: dict[str, str] | None = None
    ) -> None:
        OUT.mkdir(parents=True, exist_ok=True)
        self.log = OUT / f"{module.rpartition('.')[2]}.log"
        reader, writer = os.pipe()
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                ["taskset", "-c", str(core), python, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                cwd=ROOT,
                pass_fds=(writer,),
                env={**os.environ, **WORKER_ENV, "BENCHMARK_ANSWERS": str(writer), **(env or {})},
            )
        os.close(writer)
        self._answers = os.fdopen(reader)
        try:
            self._receive()
        except BaseException:
            self.close()
            raise

    def _receive(self) -> object:
        line = self._answers.readline()
        if not line:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise RuntimeError(f"the worker ended with status {self._process.wait()}:\n{tail}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.log.stem}: {answer['error']}")
        return answer.get("result")

    def ask(self, do: str, **arguments: object) -> object:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._receive()

    def seconds(self, do: str, **arguments: object) -> float:
        answer = self.ask(do, **arguments)
        assert isinstance(answer, float)
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def machine() -> dict[str, object]:
    """The kind of machine, never its name."""
    info = Path("/proc/cpuinfo").read_text()
    model = next((line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")), "?")
    flags = next((line.split() for line in info.splitlines() if line.startswith("flags")), [])
    memory = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    return {
        "date": date.today().isoformat(),
        "processor": model,
        "cores": os.cpu_count(),
        "extensions": [name for name in ("avx512f", "avx512_bf16", "amx_bf16") if name in flags],
        "memory": memory,
        "kernel": platform.release().split("-")[0],
        "load": os.getloadavg()[0],
    }


def describe(kind: dict[str, object]) -> str:
    memory = kind["memory"]
    assert isinstance(memory, int)
    extensions = kind["extensions"]
    assert isinstance(extensions, list)
    return (
        f"{kind['date']}, {kind['processor']}, {kind['cores']} cores, {memory / 2**30:.0f} GiB, "
        f"{' '.join(extensions) or 'no wide bf16'}; load {kind['load']:.1f} when it began"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, aligned: pastes into docs/measurements.md as it is."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        first, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        return "| " + " | ".join([first, *rest]) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(cells[0]), rule, *(line(row) for row in cells[1:])])


def report(data: dict[str, object], text: str, json_to: str | None) -> None:
    """Prints the text on stdout, or the JSON alone where `json_to` is "-"; else writes the JSON there as well."""
    if json_to == "-":
        print(json.dumps(data, indent=2))
        return
    print(text)
    if json_to:
        Path(json_to).write_text(json.dumps(data, indent=2) + "\n")


def say(text: str) -> None:
    """Progress is talk: stderr."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
