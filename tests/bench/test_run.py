"""`distserve bench` as people run it, against a server over HTTP; where signals are sent, in a process of its own."""

from __future__ import annotations

import csv
import json
import os
import pty
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.bench.standin import StandIn, serving, tokens_of

from distserve import cli

WORKLOAD = "arrival,prompt_tokens,output_tokens\n" + "".join(f"{i * 0.02},{10 + i},{1 + i % 5}\n" for i in range(30))


@pytest.fixture
def server() -> Iterator[StandIn]:
    with serving() as standin:
        yield standin


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    path = tmp_path / "w.csv"
    path.write_text(WORKLOAD)
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "distserve", "bench", *map(str, arguments)]


class Bench:
    """The command, run in this process."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        """Status, stdout and stderr."""
        status = cli.main(["bench", *map(str, arguments)])
        return status, *self._capture.readouterr()

    def json(self, *arguments: object) -> tuple[int, dict[str, Any]]:
        """Status and report."""
        status, out, _ = self(*arguments, "--json", "-")
        return status, json.loads(out)  # nothing else is on stdout


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Bench:
    return Bench(capsys)


def test_a_file_is_replayed_whole_and_exactly(bench: Bench, server: StandIn, workload: Path, tmp_path: Path) -> None:
    server.behaviour.first = 0.02
    rows = tmp_path / "rows.csv"
    status, report = bench.json(
        "--url", server.url + "/v1/", "-w", workload, "--slo", "ttft=5,tpot=5", "--requests-out", rows
    )
    assert status == 0
    assert (report["requests"], report["counted"], report["completed"], report["warmup"]) == (30, 30, 30, 0)
    assert report["attainment"] == {"joint": 1.0, "ttft": 1.0, "tpot": 1.0}
    assert report["slo"] == {"ttft": 5, "tpot": 5}
    assert report["rate"] == pytest.approx(50, rel=0.01)
    assert report["seed"] is None
    assert 0.02 <= report["ttft"]["p50"] < 1
    assert (report["model"], report["workload"], report["failed"]) == ("stand-in", "w.csv", {})
    # each request has a connection of its own: which of two that left 20 ms apart is read first is the machine's choice
    assert sorted(len(body["prompt"]) for body in server.bodies) == [10 + i for i in range(30)]
    assert {body["ignore_eos"] for body in server.bodies} == {True}
    with rows.open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["arrival"]) for row in table] == pytest.approx([i * 0.02 for i in range(30)])
    assert [int(row["output_tokens"]) for row in table] == [1 + i % 5 for i in range(30)]
    assert {row["status"] for row in table} == {"ok"}
    assert (table[0]["tpot"], table[1]["tpot"] != "") == ("", True)


def test_drawn_arrivals_drop_their_warm_up(bench: Bench, server: StandIn) -> None:
    status, report = bench.json(
        "--url", server.url, "-w", "humaneval", "--rate", 100, "-n", 50, "--fixed", "--scale", "0.5,0.1",
        "--devices", 2, "--seed", 5,
    )  # fmt: skip
    assert status == 0
    assert (report["requests"], report["rate"], report["rate_per_device"], report["seed"]) == (50, 100, 50, 5)
    assert report["warmup"] == pytest.approx(0.049)
    assert report["counted"] == 45
    assert report["slo"] == {"ttft": None, "tpot": None}


def test_a_goal_that_is_missed_is_status_1(bench: Bench, server: StandIn, workload: Path) -> None:
    server.behaviour.first = 0.05
    arguments = ("--url", server.url, "-w", workload, "--slo", "ttft=1ms")
    status, out, _ = bench(*arguments, "--goal", 0.9)
    assert status == 1
    assert "goal 90% missed" in out
    assert bench(*arguments)[0] == 0
    assert bench("--url", server.url, "-w", workload, "--slo", "ttft=60", "--goal", 0.9)[0] == 0


def test_refused_requests_are_offered_ones_that_meet_nothing(bench: Bench, server: StandIn, workload: Path) -> None:
    server.behaviour.fail_every = 3
    status, out, err = bench("--url", server.url, "-w", workload, "--json", "-")
    report = json.loads(out)
    assert status == 0
    assert report["failed"] == {"refused": 10}
    assert report["attainment"]["joint"] == pytest.approx(20 / 30)
    assert "10 requests refused, the first: HTTP 429" in err


def test_a_sweep_reports_each_rate_and_the_goodput(bench: Bench, server: StandIn) -> None:
    status, report = bench.json(
        "--url", server.url, "-w", "humaneval", "--rates", "50,100", "-n", 20, "--scale", "1,0.05", "--slo", "ttft=60",
    )  # fmt: skip
    assert status == 0
    assert [run["rate"] for run in report["runs"]] == [50, 100]
    assert (report["goodput"], report["goal"]) == (100, 0.9)


def test_a_sweep_writes_and_draws_all_its_runs(bench: Bench, server: StandIn, tmp_path: Path) -> None:
    server.behaviour.first = 0.02
    rows, drawing = tmp_path / "rows.csv", tmp_path / "p.svg"
    status, out, _ = bench(
        "--url", server.url, "-w", "humaneval", "--rates", "200,100", "-n", 100, "--scale", "1,0.02",
        "--slo", "ttft=1ms", "--requests-out", rows, "--plot", drawing,
    )  # fmt: skip
    assert status == 0  # no goal was asked for
    assert "goodput at 90%: none: not even 100 requests/s attain it" in out
    table = list(csv.DictReader(rows.read_text().splitlines()))
    assert [row["rate"] for row in table] == ["200"] * 100 + ["100"] * 100
    assert b"<svg" in drawing.read_bytes()


def test_prompts_of_another_rate_are_others(bench: Bench, server: StandIn) -> None:
    """A server that keeps prefixes would know them."""
    bench("--url", server.url, "-w", "humaneval", "--rates", "100,101", "-n", 10, "--scale", "1,0.02")
    prompts = [tuple(body["prompt"]) for body in server.bodies]
    assert len(set(prompts)) == len(prompts) == 20


def test_the_goodput_is_searched_for(bench: Bench, server: StandIn) -> None:
    server.behaviour.room, server.behaviour.first = 4, 0.05  # below 80 a second when they come evenly
    status, report = bench.json(
        "--url", server.url, "-w", "humaneval", "--find-goodput", "--rate", 40, "-n", 50, "--fixed",
        "--scale", "1,0.001", "--slo", "ttft=5", "--devices", 2,
    )  # fmt: skip
    assert status == 0
    low, high = report["goodput_interval"]
    assert 1 < low <= report["goodput"] < high <= 160
    assert report["goodput_per_device"] == report["goodput"] / 2
    assert report["slo"] == {"ttft": 5, "tpot": None}
    highest = max(report["runs"], key=lambda run: run["rate"])
    assert highest["rate"] in (80, 160)
    assert highest["requests"] <= 50  # it may end when the goal is out of reach
    assert highest["attainment"]["joint"] < 0.9


def test_targets_that_no_rate_meets(bench: Bench, server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distserve.bench.run._PAUSE", 0.0)
    server.behaviour.first = 0.01
    arguments = (
        "--url", server.url, "-w", "humaneval", "--find-goodput", "--rate", 2000, "-n", 50, "--scale", "1,0.01"
    )  # fmt: skip
    status, out, _ = bench(*arguments, "--slo", "ttft=1ms")
    assert status == 1
    assert "goodput at 90%: none: not even 62.5 requests/s attain it" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--find-goodput",), "--find-goodput needs targets"),
        (("--find-goodput", "--slo", "ttft=1", "--rates", "1,2"), "--rates and --find-goodput are both given"),
        (("--plot", "p.pdf"), "ends in .png or .svg"),
        (("--plot", "none/p.png"), "cannot be written"),
        (("--text", "none.txt"), "--text none.txt: cannot be read: No such file"),
    ],
)
def test_what_would_fail_later_is_refused_at_once(
    bench: Bench, workload: Path, arguments: tuple[str, ...], words: str
) -> None:
    status, _, err = bench("--url", "http://127.0.0.1:1", "-w", workload, *arguments)
    assert status == 2
    assert words in err


def test_prompts_of_a_persons_own_text(bench: Bench, server: StandIn, workload: Path, tmp_path: Path) -> None:
    text = tmp_path / "story.txt"
    text.write_text("Which way, which road? None knew " * 20)
    status, report = bench.json("--url", server.url, "-w", workload, "--endpoint", "chat", "--text", text)
    assert (status, report["warnings"]) == (0, [])
    assert sorted(tokens_of(body) for body in server.bodies) == [10 + i for i in range(30)]
    assert "road? None knew" in server.bodies[-1]["messages"][0]["content"]
    text.write_text(" \n")
    assert bench("--url", server.url, "-w", workload, "--text", text)[0] == 2
    text.write_bytes(b"\xff\xfe")
    assert "not a text file" in bench("--url", server.url, "-w", workload, "--text", text)[2]


def test_chat_with_text(bench: Bench, server: StandIn, workload: Path) -> None:
    server.behaviour.chat_role = True
    status, report = bench.json("--url", server.url, "-w", workload, "--endpoint", "chat", "-n", 5)
    assert (status, report["requests"]) == (0, 5)
    assert report["warnings"] == []
    assert "messages" in server.bodies[0]


def test_requests_beyond_the_context_are_cut_and_said(bench: Bench, server: StandIn, tmp_path: Path) -> None:
    server.behaviour.context = 20
    path = tmp_path / "w.jsonl"
    path.write_text('{"arrival": 0, "prompt_tokens": 100, "output_tokens": 5}\n')
    _, out, err = bench("--url", server.url, "-w", path, "--json", "-")
    assert len(server.bodies[0]["prompt"]) == 15
    assert any("cut to the context of 20 tokens" in warning for warning in json.loads(out)["warnings"])
    assert err.startswith("distserve: note: 1 of 1 requests were cut to the context of 20 tokens")  # before the load


def test_ctrl_c_reports_what_was_measured(server: StandIn, tmp_path: Path) -> None:
    server.behaviour.gap = 1.0
    path = tmp_path / "w.csv"
    path.write_text("arrival,prompt_tokens,output_tokens\n0,5,1\n0,5,1\n0.5,5,60\n3600,5,2\n")
    out = tmp_path / "report.json"
    process = subprocess.Popen(
        command("--url", server.url, "-w", path, "--json", out), stderr=subprocess.PIPE, text=True
    )
    server.wait_for(3)  # the first two were answered half a second ago, the third will take a minute
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    report = json.loads(out.read_text())
    assert report["interrupted"]
    assert (report["requests"], report["completed"]) == (2, 2)
    assert any("1 requests in flight were dropped" in warning for warning in report["warnings"])


def test_ctrl_c_in_a_sweep_keeps_what_it_has(server: StandIn, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    process = subprocess.Popen(
        command(
            "--url", server.url, "-w", "humaneval", "--rates", "1000,1", "-n", 20, "--scale", "1,0.01",
            "--slo", "ttft=60", "--json", out,
        ),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    server.wait_for(21)
    process.send_signal(signal.SIGINT)
    shown, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    report = json.loads(out.read_text())
    assert report["interrupted"]
    assert report["runs"][0]["requests"] == 20
    assert "goodput at 90%: 1000 requests/s" in shown


def test_ctrl_c_before_anything_is_quiet(server: StandIn, workload: Path) -> None:
    server.behaviour.held = True
    process = subprocess.Popen(command("--url", server.url, "-w", workload), stderr=subprocess.PIPE, text=True)
    server.wait_for(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    server.behaviour.hold.set()
    assert process.returncode == 130
    assert "nothing was measured" in err
    assert "Traceback" not in err


def test_a_server_that_dies_is_status_1_and_reported(server: StandIn, tmp_path: Path) -> None:
    path = tmp_path / "w.csv"
    path.write_text("arrival,prompt_tokens,output_tokens\n0,5,2\n0.1,5,2\n1.5,5,2\n2.0,5,2\n")
    process = subprocess.Popen(
        command("--url", server.url, "-w", path, "--json", "-"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    server.wait_for(2)
    server.stop()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "no longer answers" in err
    report = json.loads(out)
    assert report["requests"] == 4
    assert report["failed"].get("unreachable", 0) >= 2


def test_no_more_connections_is_the_clients_own_limit(server: StandIn, tmp_path: Path) -> None:
    path = tmp_path / "w.csv"
    path.write_text("arrival,prompt_tokens,output_tokens\n" + "0,5,2\n" * 80)
    server.behaviour.first = 1.0
    script = f"ulimit -n 60; exec {shlex.join(command('--url', server.url, '-w', path, '--json', '-'))}"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=60)
    report = json.loads(done.stdout)
    assert done.returncode == 0
    assert 10 < report["failed"]["client_limit"] < 80
    assert report["completed"] == 80 - report["failed"]["client_limit"]
    assert "Too many open files: let it open more files (ulimit -n)" in done.stderr


def test_no_server_at_all_is_status_1_in_one_line(bench: Bench, workload: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        status, out, err = bench("--url", f"127.0.0.1:{unused.getsockname()[1]}", "-w", workload)
    assert (status, out) == (1, "")
    assert err.startswith("distserve: error: no server answers at http://127.0.0.1:")
    assert err.count("\n") == 1


def test_every_request_failing_is_status_1(bench: Bench, server: StandIn, workload: Path) -> None:
    server.behaviour.status = 500
    assert bench("--url", server.url, "-w", workload)[0] == 1


def test_what_to_know_about_the_figures_is_said(bench: Bench, server: StandIn, workload: Path) -> None:
    server.behaviour.short, server.behaviour.usage, server.behaviour.tokenize = 1, False, False
    path = workload.with_name("long.csv")
    path.write_text("arrival,prompt_tokens,output_tokens\n0,50,5\n0,50,5\n")
    status, report = bench.json("--url", server.url, "-w", path, "--prompts", "text")
    warnings = "\n".join(report["warnings"])
    assert status == 0
    assert "neither /tokenize nor usage" in warnings
    assert "2 answers were shorter than asked for" in warnings
    assert "2 answers came without usage" in warnings
    server.behaviour.usage = True
    path.write_text("arrival,prompt_tokens,output_tokens\n0,2,5\n0,2,5\n")
    _, report = bench.json("--url", server.url, "-w", path, "--endpoint", "chat", "--no-ignore-eos")
    warnings = "\n".join(report["warnings"])
    assert "prompts are" in warnings  # the template alone is longer
    assert "shorter than asked" not in warnings
    assert "ignore_eos" not in server.bodies[-1]


def test_the_key_is_sent(bench: Bench, server: StandIn, workload: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.behaviour.key = "secret"
    status, out, err = bench("--url", server.url, "-w", workload, "-n", 1)
    assert (status, out) == (2, "")
    assert "--api-key" in err
    monkeypatch.setenv("DISTSERVE_API_KEY", "secret")
    assert bench("--url", server.url, "-w", workload, "-n", 1)[0] == 0


def on_a_terminal(*arguments: object) -> tuple[int, bytes, bytes]:
    """Status, stdout, and what stood on the terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command(*arguments),
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 65536)
        except OSError:  # the terminal's other end was closed
            break
    os.close(ours)
    out, _ = process.communicate(timeout=60)
    return process.returncode, out, shown


def test_on_a_terminal_it_shows_its_progress(server: StandIn, workload: Path) -> None:
    server.behaviour.first = 0.1
    status, out, shown = on_a_terminal("--url", server.url, "-w", workload, "--slo", "ttft=9")
    assert status == 0
    for words in (b"30/30", b"in flight", b"no token yet", b"targets met", b"TTFT p50"):
        assert words in shown
    assert b"attainment  100.0%" in out


def test_on_a_terminal_a_sweep_shows_what_earlier_rates_said(server: StandIn) -> None:
    status, out, shown = on_a_terminal(
        "--url", server.url, "-w", "humaneval", "--rates", "21,22", "-n", 10, "--scale", "1,0.02"
    )
    assert status == 0
    assert b"2 of 2: humaneval at 22 requests/s" in shown
    assert b"21/s" in shown.partition(b"2 of 2")[2]
    assert b"22/s" in out


def test_bench_needs_neither_the_server_nor_torch() -> None:
    code = "import sys, distserve.bench.run; print([m for m in sys.modules if m in ('torch', 'transformers', 'numpy')])"
    more = "; print([m for m in sys.modules if m.startswith('distserve.') and 'bench' not in m])"
    done = subprocess.run([sys.executable, "-c", code + more], capture_output=True, text=True, timeout=60)
    heavy, ours = done.stdout.splitlines()
    assert heavy == "[]"
    assert "serve" not in ours.replace("distserve", "")
