"""A real server in processes of its own, started as a user starts it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

READY_WITHIN = 90.0  # seconds; the machine may be busy with other tests
COMMAND = [str(Path(sys.executable).with_name("distserve")), "serve"]


class Server:
    """A running `distserve serve`. Its standard error is kept in `log`."""

    def __init__(self, args: list[str], log: Path, environ: Mapping[str, str] | None = None) -> None:
        self.log = log
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                [*COMMAND, *args, "--port", "0"], stderr=stderr, env={**os.environ, **(environ or {})}
            )
        self.url = ""

    def wait_ready(self) -> None:
        deadline = time.monotonic() + READY_WITHIN
        while not (found := re.search(r"ready at (http://\S+)", self.log.read_text())):
            assert self.process.poll() is None, f"the server ended:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"not ready:\n{self.log.read_text()}"
            time.sleep(0.05)
        self.url = found[1]

    def get(self, path: str) -> Any:
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return json.load(error)

    def complete(self, prompt: str | list[int], **fields: Any) -> Any:
        body = json.dumps({"prompt": prompt, "temperature": 0, **fields}).encode()
        request = urllib.request.Request(self.url + "/v1/completions", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def text(self, prompt: str | list[int], **fields: Any) -> str:
        return str(self.complete(prompt, **fields)["choices"][0]["text"])

    def metrics(self) -> dict[str, float]:
        """Samples by name with their labels, such as `distserve:num_handoffs_waiting{instance="prefill-0",...}`."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    def total(self, name: str) -> float:
        """A metric summed over its labels."""
        return sum(value for key, value in self.metrics().items() if key.partition("{")[0] == name)

    def pid(self, instance: str) -> int | None:
        """Of an instance's process; None while it is being restarted."""
        pids: dict[str, int | None] = {i["name"]: i["pid"] for i in self.get("/health")["instances"]}
        return pids[instance]

    def kill(self, instance: str, number: int = signal.SIGKILL) -> None:
        pid = self.pid(instance)
        assert pid is not None, f"{instance} is down"
        os.kill(pid, number)

    def processes(self) -> list[psutil.Process]:
        """The gateway and its instances."""
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def wait_for(self, what: str, condition: Any, within: float = 30.0) -> None:
        deadline = time.monotonic() + within
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not within {within:g} s\n{self.log.read_text()[-2000:]}"
            time.sleep(0.05)

    def idle(self) -> bool:
        """Every block on every instance is free and nothing waits."""
        names = ("vllm:kv_cache_usage_perc", "vllm:num_requests_running", "vllm:num_requests_waiting")
        return not any(self.total(name) for name in (*names, "distserve:num_handoffs_waiting"))

    def stop(self, number: int = signal.SIGINT, within: float = 40.0) -> int:
        """Sends a signal and waits for the end; returns the exit status."""
        self.process.send_signal(number)
        return self.process.wait(within)


def survives(server: Server, victim: str, max_tokens: int) -> None:
    """Stories that an instance dies over are told as ever, and it comes back."""
    stories = {i: server.text(f"story {i}", max_tokens=max_tokens, seed=i) for i in range(3)}
    found: dict[int, str] = {}

    def ask(i: int) -> None:
        found[i] = server.text(f"story {i % 3}", max_tokens=max_tokens, seed=i % 3)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    server.wait_for("work", lambda: not server.idle())
    server.kill(victim)
    for thread in threads:
        thread.join()
    assert found == {i: stories[i % 3] for i in range(12)}
    server.wait_for("restart", lambda: server.pid(victim) is not None)


@contextmanager
def serving(tmp_path: Path, *args: str, environ: Mapping[str, str] | None = None) -> Iterator[Server]:
    """A server that is ready; killed at the end if the test has not stopped it."""
    server = Server([*args, "--awake", "0"] if "--awake" not in args else list(args), tmp_path / "server.log", environ)
    try:
        server.wait_ready()
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait()
