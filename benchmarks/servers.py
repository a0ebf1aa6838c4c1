"""Starts servers, ours and vLLM's, waits until they answer, reads what they use, and stops them. Knows no figure.

Memory is PSS (what a process has to itself plus its share of what it shares), summed over the process tree: pages that
two processes map count once. RSS counts them in each.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType

import psutil

from benchmarks.harness import OUT

READY = 600.0  # seconds: a compiler may run at a peer's first start


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        assert isinstance(port, int)
        return port


class Server:
    """A server's process group, in a session of its own. Entering waits until /health answers 200; `ready` is how long
    that took. Who starts several at once begins each, looks until all are healthy, and ends them: nothing of this
    blocks but `stop`."""

    def __init__(self, name: str, command: Sequence[str], port: int, env: dict[str, str] | None = None) -> None:
        self.name = name
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.command = list(command)
        self.env = {**os.environ, **(env or {})}
        self.log = OUT / f"server-{name}.log"
        self.ready = 0.0

    def __enter__(self) -> Server:
        signal.signal(signal.SIGTERM, _leave)  # a benchmark that is ended takes its servers with it
        self.begin()
        try:
            while not self.healthy():
                self.check()
                time.sleep(0.05)
        except BaseException:
            self.stop()
            raise
        self.ready = time.perf_counter() - self._began
        return self

    def begin(self) -> None:
        """Starts it and does not wait."""
        OUT.mkdir(parents=True, exist_ok=True)
        self._began = time.perf_counter()
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                self.command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self.env, start_new_session=True
            )

    def check(self) -> None:
        """While it is not ready. Raises `RuntimeError` where it has ended or takes too long."""
        if not self.running:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise RuntimeError(f"{self.name} ended with status {self._process.returncode}; see {self.log}:\n{tail}")
        if time.perf_counter() - self._began > READY:
            raise RuntimeError(f"{self.name} was not ready within {READY:.0f} s; see {self.log}")

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """Of its first process, and the session of all of them."""
        return self._process.pid

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def ask_to_end(self) -> None:
        """As an operator would."""
        if self.running:
            self._process.send_signal(signal.SIGTERM)

    def stop(self) -> None:
        """Asks, then uses force: nothing of it may disturb the next measurement."""
        self.ask_to_end()
        try:
            self._process.wait(40)
        except subprocess.TimeoutExpired:
            print(f"{self.name} ignored SIGTERM for 40 s and is killed", file=sys.stderr)
        with contextlib.suppress(ProcessLookupError):  # all of its processes have ended
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def processes(self) -> list[psutil.Process]:
        """The server's own process first."""
        own = psutil.Process(self._process.pid)
        return [own, *own.children(recursive=True)]

    def pin(self, own: int, others: int) -> None:
        """Binds the server's own process (ours: the gateway) to one core and its children to another."""
        first, *children = self.processes()
        for process in (first, *children):
            for thread in process.threads():
                os.sched_setaffinity(thread.id, {own if process is first else others})

    def memory(self) -> dict[str, int]:
        """Bytes of the whole tree: {"pss": ..., "rss": ..., "processes": ...}."""
        pss = rss = count = 0
        for process in self.processes():
            try:
                text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue  # ended meanwhile
            found = {key: int(value) * 1024 for key, value in re.findall(r"^(Pss|Rss):\s+(\d+) kB", text, re.MULTILINE)}
            pss += found["Pss"]
            rss += found["Rss"]
            count += 1
        return {"pss": pss, "rss": rss, "processes": count}

    def cpu(self) -> float:
        """Seconds of processor time of the server's own process (ours: the gateway) since it began."""
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)

    def metrics(self) -> dict[str, float]:
        """Samples of /metrics without labels, summed over them: {"distserve:pull_seconds_sum": ...}."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as response:
            text = response.read().decode()
        out: dict[str, float] = {}
        for name, value in re.findall(r"^([a-z_:]+)(?:\{[^}]*\})? (\S+)$", text, re.MULTILINE | re.IGNORECASE):
            if not name.endswith("_bucket"):
                out[name] = out.get(name, 0.0) + float(value)
        return out


def distserve(*arguments: str, model: str = "demo", name: str = "distserve") -> Server:
    port = free_port()
    command = [sys.executable, "-m", "distserve", "serve", model, "--port", str(port), *arguments]
    return Server(name, command, port)


def vllm(
    python: str,
    folder: Path,
    *,
    kv_gib: int,
    cores: str,
    arguments: Sequence[str] = (),
    env: dict[str, str] | None = None,
) -> Server:
    """vLLM's OpenAI server on its CPU build, compiled (its default)."""
    port = free_port()
    command = [
        python,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(folder),
        "--served-model-name",
        "demo",
    ]
    command += [
        "--dtype",
        "bfloat16",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--max-model-len",
        "8192",
        *arguments,
    ]
    env = {
        **(env or {}),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(kv_gib),
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    return Server("vllm", command, port, env)
