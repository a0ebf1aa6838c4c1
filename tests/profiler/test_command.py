"""`distserve profile` as a person runs it: everything is real but the model, so that its latency is known."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distserve import machine
from distserve.cli import main
from distserve.costs.profile import Profile

FAKE = "fake:step=0.004,token=0.00002"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "distserve", "profile", *arguments]


def test_a_machine_is_profiled_with_its_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "costs.json"
    arguments = ["--time", "10", "--longest", "128", "--kv-memory", "4MiB"]
    assert main(["profile", FAKE, "-o", str(out), *arguments]) == 0
    said = capsys.readouterr()
    assert "knee" in said.out
    assert "wrote" in said.err
    profile = Profile.load(out)
    contents = profile.contents
    assert contents.device == machine.device_name(machine.resolve_device("auto"))
    assert contents.machine.fingerprint == machine.fingerprint("cpu")
    entry = contents.entries[FAKE][1, 1]
    assert entry.coefficients.prompts(100, 100**2) == pytest.approx(0.006, rel=0.05)
    assert entry.coefficients.decodes(8, 800) == pytest.approx(0.00416, rel=0.05)
    engine = contents.engine
    assert 0 <= engine.request < 0.2  # 0: a busy machine's turns around a step took as long as all of it
    assert engine.request + engine.prompt_step.per_step > 0
    assert 0 <= engine.decode_step.per_step < 0.05
    assert engine.kv_memory == 4 << 20
    assert engine.prefill_beside.decode == pytest.approx(1.0, abs=0.1)  # a fake computes nothing


def test_ctrl_c_keeps_what_is_there(tmp_path: Path) -> None:
    out = tmp_path / "costs.json"
    work = command(FAKE, "-o", str(out), "--time", "10", "--longest", "128", "--kv-memory", "4MiB")
    with subprocess.Popen(work, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "neighbour" in line:
                os.kill(process.pid, signal.SIGINT)
                break
        said = process.stderr.read()
    assert process.returncode == 130
    assert "measured so far" in said
    assert json.loads(out.read_text())["models"][FAKE]["1x1"]["prefill_points"]


def test_ctrl_c_before_there_is_enough_says_what_is_missing(tmp_path: Path) -> None:
    out = tmp_path / "costs.json"
    with subprocess.Popen(command(FAKE, "-o", str(out)), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "loading" in line:
                os.kill(process.pid, signal.SIGINT)
                break
        said = process.stderr.read()
    assert process.returncode == 130
    assert "that decode are needed" in said
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no/such/folder/model.gguf"], "no model"),
        ([FAKE, "-o", "no/such/folder/costs.json"], "cannot be written"),
        ([FAKE, "--time", "1"], "10 seconds at least"),
        ([FAKE, "--longest", "3"], "64 tokens"),
        ([FAKE, "--tp", "0"], "at least 1"),
        ([FAKE, "--kv-memory", "much"], "memory"),
        ([FAKE, "--dtype", "int3"], "dtype"),
        ([FAKE, "--block-size", "7"], "block-size"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    assert main(["profile", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len([line for line in error.splitlines() if "error" in line]) == 1
    assert time.monotonic() - began < 20
