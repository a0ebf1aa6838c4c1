"""Real processes around a model that takes no time: signals, deaths, hangs, departures, refusals."""

from __future__ import annotations

import asyncio
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import psutil
import pytest
from tests.serve.live import COMMAND, Server, serving, survives

PAIRS = """
[[instances]]
role = "prefill"
count = 2
[[instances]]
role = "decode"
count = 2
"""


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    path = tmp_path / "pairs.toml"
    path.write_text(PAIRS)
    return str(path)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One prefill and one decode, 5 ms a step."""
    with serving(tmp_path_factory.mktemp("fake"), "fake:step=0.005", "--kv-memory", "8MiB") as running:
        yield running


def test_the_openai_client_streams_and_does_not(server: Server) -> None:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none") as client:
        whole = client.completions.create(model="fake:step=0.005", prompt="one two", max_tokens=20, seed=1)
        pieces = client.completions.create(
            model="fake:step=0.005", prompt="one two", max_tokens=20, seed=1, stream=True
        )
        assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
        assert whole.choices[0].finish_reason == "length"


def test_health_names_the_instances_and_metrics_split_the_first_token(server: Server) -> None:
    server.text("hello", max_tokens=5)
    health = server.get("/health")
    assert [(i["name"], i["role"], i["alive"]) for i in health["instances"]] == [
        ("prefill-0", "prefill", True),
        ("decode-0", "decode", True),
    ]
    assert server.total("vllm:time_to_first_token_seconds_count") > 0
    for phase in ("distserve:phase_queue_seconds_count", "distserve:phase_first_token_seconds_count"):
        assert server.total(phase) > 0
    assert server.total("distserve:pull_bytes_total") > 0


def test_a_client_that_leaves_frees_kv_on_both_sides_within_a_second(server: Server) -> None:
    body = {"prompt": "a story", "max_tokens": 4000, "stream": True, "ignore_eos": True}
    with httpx2.stream("POST", server.url + "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        for _ in range(10):
            next(lines)
        assert not server.idle()
    server.wait_for("all blocks free", server.idle, within=1.5)


async def test_thousands_of_requests_with_departures_leak_nothing(server: Server) -> None:
    rng = random.Random(1)

    async def one(client: httpx2.AsyncClient, gate: asyncio.Semaphore) -> None:
        body = {"prompt": [rng.randrange(1000) for _ in range(rng.randint(1, 200))], "max_tokens": rng.randint(1, 30)}
        async with gate:
            if rng.random() < 0.5:
                assert (await client.post("/v1/completions", json=body)).status_code == 200
                return
            async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
                leave_after = rng.randint(0, 10)
                async for _ in answer.aiter_lines():
                    leave_after -= 1
                    if leave_after <= 0:
                        return

    gate = asyncio.Semaphore(64)
    limits = httpx2.Limits(max_connections=64)
    async with httpx2.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client:
        await asyncio.gather(*(one(client, gate) for _ in range(2000)))
    server.wait_for("all blocks free", server.idle, within=5)
    assert server.total("distserve:instance_restarts_total") == 0
    assert server.total("distserve:digest_failures_total") == 0


@pytest.mark.parametrize("victim", ["prefill-0", "decode-1"])
def test_answers_survive_the_death_of_an_instance(tmp_path: Path, pairs: str, victim: str) -> None:
    with serving(tmp_path, "fake:step=0.01", "--plan", pairs, "--kv-memory", "8MiB") as server:
        survives(server, victim, max_tokens=60)
        assert server.total("distserve:instance_restarts_total") == 1
        server.wait_for("all blocks free", server.idle, within=5)


def test_answers_survive_the_death_of_the_fork_server(tmp_path: Path) -> None:
    """And of all instances with it: everything comes back, and nobody's answer changes."""
    with serving(tmp_path, "fake:step=0.01", "--kv-memory", "8MiB") as server:
        good = server.text("story", max_tokens=100, seed=3)
        found: list[str] = []
        thread = threading.Thread(target=lambda: found.append(server.text("story", max_tokens=100, seed=3)))
        thread.start()
        server.wait_for("work", lambda: not server.idle())
        fork_server = psutil.Process(server.pid("decode-0")).parent()
        assert fork_server is not None
        fork_server.kill()
        thread.join(60)
        assert found == [good]


def test_instances_can_be_interpreters_of_their_own(tmp_path: Path) -> None:
    """As on CUDA, where nothing may be forked."""
    sizes = ("--kv-memory", "8MiB", "--awake", "0")
    with serving(tmp_path, "fake:step=0.01", *sizes, environ={"DISTSERVE_FORK": "off"}) as server:
        processes = server.processes()
        assert len(processes) == 3
        good = server.text("story", max_tokens=50, seed=3)
        old = server.pid("decode-0")
        server.kill("decode-0")
        server.wait_for("restart", lambda: server.pid("decode-0") not in (None, old))
        assert server.text("story", max_tokens=50, seed=3) == good
        children = server.processes()[1:]
        server.process.kill()
        server.process.wait()
        _, alive = psutil.wait_procs(children, timeout=5)
        assert not alive


def test_a_hung_instance_is_fenced_and_replaced(tmp_path: Path) -> None:
    with serving(tmp_path, "fake:step=0.01", "--kv-memory", "8MiB") as server:
        good = server.text("story", max_tokens=100, seed=3)
        found: list[str] = []
        thread = threading.Thread(target=lambda: found.append(server.text("story", max_tokens=100, seed=3)))
        thread.start()
        server.wait_for("work", lambda: not server.idle())
        server.kill("decode-0", signal.SIGSTOP)
        thread.join(30)
        assert found == [good]
        assert "hung" in server.log.read_text()


def test_sigterm_lets_running_requests_finish_and_leaves_nothing(tmp_path: Path) -> None:
    with serving(tmp_path, "fake:step=0.01", "--kv-memory", "8MiB", "--awake", "2") as server:
        processes = server.processes()
        found: list[str] = []
        thread = threading.Thread(target=lambda: found.append(server.text("story", max_tokens=150)))
        thread.start()
        server.wait_for("work", lambda: not server.idle())
        assert server.stop(signal.SIGTERM) == 0
        thread.join()
        assert len(found) == 1
        assert len(processes) >= 4  # the gateway, the fork server, two instances, and who keeps their cores awake
        _, alive = psutil.wait_procs(processes, timeout=2)
        assert not alive


def test_two_interrupts_end_at_once(tmp_path: Path) -> None:
    with serving(tmp_path, "fake:step=0.01", "--kv-memory", "8MiB") as server:
        processes = server.processes()
        body = {"prompt": "a story", "max_tokens": 8000, "stream": True, "ignore_eos": True}
        with httpx2.stream("POST", server.url + "/v1/completions", json=body) as answer:
            next(answer.iter_lines())
            server.process.send_signal(signal.SIGINT)
            server.wait_for("the first to be heard", lambda: "stopping" in server.log.read_text())
            assert server.process.poll() is None
            assert server.stop(signal.SIGINT, within=10) == 0
        _, alive = psutil.wait_procs(processes, timeout=2)
        assert not alive


def test_instances_do_not_outlive_a_killed_gateway(tmp_path: Path) -> None:
    with serving(tmp_path, "fake", "--kv-memory", "8MiB") as server:
        children = server.processes()[1:]
        assert len(children) >= 3  # the fork server, two instances, and who keeps their cores awake
        server.process.kill()
        server.process.wait()
        _, alive = psutil.wait_procs(children, timeout=5)
        assert not alive


def refused(*args: str) -> str:
    """The one line with which `distserve serve` refuses."""
    done = subprocess.run([*COMMAND, *args], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line and not line.startswith(("hint:", "WARNING"))]
    assert len(lines) == 1, done.stderr  # but for warnings, such as that two instances share a core
    return lines[0]


def test_a_port_in_use_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}" in refused("fake", "--port", str(port))


@pytest.mark.parametrize(
    ("plan", "cure"),
    [
        ('[[instances]]\nrole = "prefill"\n', "decode"),
        ('[[instances]]\nrole = "colocated"\npp = 3\n', "take 1 to 2"),
        ('[[instances]]\nrole = "colocated"\nkv_memory = "90TiB"\n', "lower --kv-memory"),
        ('[[instances]]\nrole = "colocated"\ndevices = [["node0:99"]]\n', "node0:99|99"),
    ],
)
def test_a_plan_that_does_not_fit_is_one_line(tmp_path: Path, plan: str, cure: str) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(plan)
    line = refused("fake", "--plan", str(path), "--port", "0")
    assert any(word in line for word in cure.split("|"))


def test_kv_memory_too_small_for_a_block_is_one_line() -> None:
    started = time.monotonic()
    assert "KV memory" in refused("fake", "--kv-memory", "100", "--port", "0")
    assert time.monotonic() - started < 30
