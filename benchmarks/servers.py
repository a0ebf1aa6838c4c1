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
    """A server's process group. Entering waits until /health answers 200; `ready` is how long that took."""

    def __init__(self, name: str, command: Sequence[str], port: int, env: dict[str, str] | None = None) -> None:
        self.name = name
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.command = list(command)
        self.env = {**os.environ, **(env or {})}
        self.log = OUT / f"server-{name}.log"
        self.ready = 0.0

    def __enter__(self) -> Server:
        OUT.mkdir(parents=True, exist_ok=True)
        signal.signal(signal.SIGTERM, _leave)  # a benchmark that is ended takes its servers with it
        begin = time.perf_counter()
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                self.command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self.env, start_new_session=True
            )
        try:
            while not self._healthy():
                if self._process.poll() is not None:
                    tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
                    raise RuntimeError(f"{self.name} ended with status {self._process.returncode}:\n{tail}")
                if time.perf_counter() - begin > READY:
                    raise RuntimeError(f"{self.name} was not ready within {READY:.0f} s; see {self.log}")
                time.sleep(0.05)
        except BaseException:
            self._stop()
            raise
        self.ready = time.perf_counter() - begin
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _stop(self) -> None:
        """As an operator would, then by force: nothing of it may disturb the next measurement."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
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


def vllm(python: str, folder: Path, *, kv_gib: int, cores: str, arguments: Sequence[str] = ()) -> Server:
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
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(kv_gib),
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    return Server("vllm", command, port, env)
