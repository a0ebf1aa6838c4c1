"""`distserve plan` as a person types it, and the same question as a program asks it."""

from __future__ import annotations

import builtins
import json
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from distserve import cli
from distserve.costs.base import Pace, Weather
from distserve.costs.choose import choose_costs
from distserve.costs.profile import ProfileCosts
from distserve.metrics import SLO
from distserve.plan import Plan
from distserve.planner.answer import Answer, Dedicated, InfeasibleError
from distserve.planner.api import plan, simulate
from distserve.workload import Workload

ARGUMENTS = [
    *("plan", "--model", "facebook/opt-13b", "--cluster", "a100-1x2", "-w", "humaneval", "--rate", "4", "-j", "1"),
    *("--slo", "ttft=0.125,tpot=0.2"),
]


@dataclass(frozen=True)
class Told:
    """What one command printed and wrote."""

    out: str
    err: str
    folder: Path


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    folder = tmp_path_factory.mktemp("plan")
    files = ["-o", "plan.toml", "--json", "answer.json", "--plot", "plan.svg"]
    command = [sys.executable, "-m", "distserve", *ARGUMENTS, *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=100)
    assert done.returncode == 0, done.stderr
    return Told(done.stdout, done.stderr, folder)


def test_a_person_gets_a_table_and_a_plan_that_loads(told: Told) -> None:
    for word in ("plan", "goodput", "95% sure", "bottleneck", "runner-up", "TTFT", "TPOT", "queue", "node0:0"):
        assert word in told.out, word
    assert "choosing a plan" in told.err
    assert "wrote plan.toml" in told.err
    chosen = Plan.load(told.folder / "plan.toml")
    assert chosen.model == "facebook/opt-13b"
    assert chosen.device == "a100-80g"
    assert all(replica.devices for replica in chosen.replicas())
    assert chosen.machine is None  # shipped costs are of no machine in particular


def test_a_program_gets_json(told: Told) -> None:
    answer: dict[str, Any] = json.loads((told.folder / "answer.json").read_text())
    goodput = answer["goodput"]
    assert 0 < goodput["low"] <= goodput["rate"] <= goodput["high"]
    assert goodput["rate"] > 4
    assert goodput["per_device"] == pytest.approx(goodput["rate"] / answer["devices"])
    assert answer["report"]["attainment"]["joint"] >= 0.9
    assert answer["binding"] in ("ttft", "tpot")
    assert answer["bottleneck"] in answer["utilization"]
    assert set(answer["split"]) == {"queue", "prefill", "transfer_wait", "transfer", "decode"}
    assert answer["runner_up"]["devices"] >= answer["devices"]
    assert Plan.from_toml(answer["plan"]).num_devices == answer["devices"]
    assert sum(len(instance["devices"]) for instance in answer["instances"]) == answer["devices"]


def test_a_plot_is_drawn(told: Told) -> None:
    assert "<svg" in (told.folder / "plan.svg").read_text()
    [first, *_] = json.loads((told.folder / "answer.json").read_text())["curves"]
    attained = [attainment for _, attainment in first["by_rate"]]
    assert attained[0] > 0.9 > attained[-1]
    assert [attainment for _, attainment in first["by_scale"]] == sorted(a for _, a in first["by_scale"])


def test_json_on_stdout_is_alone_there_and_an_slo_out_of_reach_is_no_plan_but_names_the_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.toml"
    asked = [*ARGUMENTS[:4], "a100-1x1", *ARGUMENTS[5:-1]]
    assert cli.main([*asked, "ttft=0.02,tpot=0.2", "-o", str(file)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 2
    assert "no deployment of up to 1 devices meets ttft 0.02 s, tpot 0.2 s" in err
    nearest = err.partition("ttft ")[2].partition("ttft ")[2].split(" s")[0]
    assert 0.02 < float(nearest) < 0.1
    assert not file.exists()
    named = f"ttft={float(nearest) * 1.05},tpot=0.2"
    assert cli.main([*asked, named, "--json", "-"]) == 0, "what was named can be met"
    out, err = capsys.readouterr()
    assert json.loads(out)["devices"] == 1
    assert "goodput" in err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--cluster": "a100-1x9999999"}, ["devices"]),
        ({"--cluster": "nowhere"}, ["there is no cluster"]),
        ({"--model": "facebook/opt-14b"}, ["facebook/opt-14b", "did you mean"]),
        ({"--model": "facebook/opt-175b", "--cluster": "a100-1x2"}, ["no instance fits 2 devices"]),
        ({"-w": "sharegp"}, ["did you mean sharegpt"]),
        ({"--rate": "nan"}, ["rate"]),
        ({"--rate": "-1"}, ["above 0"]),
        ({"--slo": "ttft=0.1;tpot=1"}, ["write each target once"]),
        ({"--slo": "chat:ttft=0.1,tpot=1"}, ["chat", "no request of it"]),
        ({"--attainment": "1.5"}, ["between 0 and 1"]),
        ({"--algorithm": "medium"}, ["auto, high, low"]),
        ({"--devices": "0"}, ["at least 1"]),
        ({"--costs": "a100-80g", "--cluster": "h100-1x2"}, ["a100-80g", "h100-80g"]),
        ({"--costs": "a100-80g", "--model": "facebook/opt-175b"}, ["opt-175b"]),
        ({"--costs": "none.json"}, ["none.json"]),
        ({"--output": "/nonexistent/plan.toml"}, ["cannot be written"]),
        ({"--plot": "plot.doc"}, [".png or .svg"]),
        ({"-j": "0"}, ["--jobs 0"]),
    ],
)
def test_bad_input_is_one_line_with_the_cure(
    change: dict[str, str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = dict(zip(ARGUMENTS[1::2], ARGUMENTS[2::2], strict=True)) | change
    assert cli.main(["plan", *[part for option in options.items() for part in option]]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert all(word in err for word in words), err


@pytest.mark.parametrize("rows", ["1,10,5\n0.5,10,5", "nan,10,5", "0,-3,5", ""])
def test_bad_workloads_are_refused(rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(f"arrival,prompt_tokens,output_tokens\n{rows}\n")
    options = dict(zip(ARGUMENTS[1::2], ARGUMENTS[2::2], strict=True)) | {"-w": str(file)}
    assert cli.main(["plan", *[part for option in options.items() for part in option]]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_plot_without_matplotlib_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert cli.main([*ARGUMENTS, "--plot", str(tmp_path / "plan.png")]) == 2
    assert "distserve[plots]" in capsys.readouterr().err


def test_ctrl_c_ends_the_search_and_its_processes(tmp_path: Path) -> None:
    arguments = [*("plan", "--model", "facebook/opt-66b", "--cluster", "a100-4x8", "-w", "sharegpt", "-j", "2")]
    arguments += ["--slo", "ttft=2.5,tpot=0.15", "-o", str(tmp_path / "plan.toml")]
    command = [sys.executable, "-m", "distserve", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "choosing a plan" in process.stderr.readline()
        parent = psutil.Process(process.pid)
        while not parent.children(recursive=True):
            assert process.poll() is None
        children = parent.children(recursive=True)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert err.splitlines() == ["distserve: stopped: no plan was chosen"]
    assert not psutil.wait_procs(children, timeout=30)[1]
    assert not (tmp_path / "plan.toml").exists()


# The same from Python


def test_means_are_a_workload() -> None:
    answer = plan(
        "facebook/opt-13b",
        "a100-1x2",
        avg_input_length=160,
        avg_output_length=60,
        arrival_rate=3,
        ttft_slo=0.25,
        tpot_slo=0.1,
    )
    assert isinstance(answer, Answer)
    assert answer.goodput.rate > 3
    assert answer.num_devices <= 2
    assert answer.plan.num_devices == answer.num_devices
    assert all(spec.max_batch_tokens or spec.chunk_tokens for spec in answer.plan.instances if spec.role != "decode")
    if answer.ratio is None:
        assert answer.colocated_instances is not None
        assert answer.prefill is None
    else:
        assert answer.prefill is not None
        assert answer.ratio[0] == answer.prefill.count
    report = simulate(answer.plan, "humaneval", rate=2, requests=300, slo=SLO(1, 1))
    assert report.attainment.joint > 0.9


def test_several_applications_each_meet_their_own_targets() -> None:
    chat, code = (Workload.load(name).head(400) for name in ("sharegpt", "humaneval"))
    mixed = [r for pair in zip(chat, list(code) * 3, strict=False) for r in pair]
    arrivals = tuple(
        type(request)(0.0, request.prompt_tokens, request.output_tokens, ("chat", "code")[i % 2])
        for i, request in enumerate(mixed)
    )
    workload = Workload("mixed", arrivals, timed=False)
    answer = plan(
        "facebook/opt-13b", "a100-1x4", workload, rate=4, slo=["chat:ttft=1,tpot=0.1", "code:ttft=0.2,tpot=0.2"]
    )
    reports = answer.answers.values() if isinstance(answer, Dedicated) else [answer]
    for each in reports:
        assert all(attainment.joint >= 0.88 for attainment in each.report.by_app.values())
        assert set(each.report.by_app) <= {"chat", "code"}


def test_an_infeasible_question_raises() -> None:
    with pytest.raises(InfeasibleError, match="nearest that can be met"):
        plan("facebook/opt-13b", "a100-1x1", "humaneval", rate=1, slo="ttft=0.125,tpot=0.001")


def test_targets_that_a_machines_weather_spoils_at_any_rate_are_infeasible() -> None:
    """What arithmetic allows, and no run attains, is no goodput: not even that of the rate that was tried first."""
    costs = choose_costs("facebook/opt-13b", "a100-80g", "a100-80g")
    assert isinstance(costs, ProfileCosts)
    half_the_time = Weather((Pace(0.0, 1.0, 1.0), Pace(5.0, 3.0, 3.0)), 10.0)
    costs.engine = replace(costs.engine, weather=half_the_time)
    with pytest.raises(InfeasibleError, match="at any rate"):
        plan("facebook/opt-13b", "a100-1x2", "humaneval", slo="ttft=0.125,tpot=0.03", costs=costs)


def test_the_package_is_light_and_its_plan_is_the_function() -> None:
    code = (
        "import sys, distserve\n"
        "assert not {'rich', 'typer', 'torch', 'numpy', 'distserve.planner'} & set(sys.modules)\n"
        "from distserve.plan import Plan\n"
        "from distserve import plan, simulate, Workload, SLO, Cluster\n"
        "import distserve.plan\n"
        "assert callable(distserve.plan) and distserve.plan is plan, distserve.plan\n"
        "assert Plan.__module__ == 'distserve.plan'\n"
        "assert sorted(distserve.__all__, key=str.lower) == sorted(distserve.__all__, key=str.lower)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
