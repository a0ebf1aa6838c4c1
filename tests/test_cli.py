"""The command line: what it teaches, what it refuses, and how quickly it answers."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

from distserve import cli
from distserve.serve.options import ServeOptions


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "distserve", *arguments],
        capture_output=True, text=True, timeout=60, env=os.environ | environment,
    )  # fmt: skip


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a command that is refused with status 2, in one line on stderr (and perhaps a hint)."""
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0].startswith("distserve: error: ")
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("hint: "))
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["serve", "bench", "Start here"]),
        (["-h"], ["serve", "bench"]),
        (
            ["serve", "--help"],
            ["--plan FILE", "smollm2-135m-instruct", "DISTSERVE_API_KEY", "Examples:", "[default: 8000]"],
        ),
        (["bench", "--help"], ["--slo TARGETS", "ttft=0.25,tpot=0.1", "sharegpt", "Examples:", "all offered"]),
    ],
)
def test_help_teaches(capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]) -> None:
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    text = " ".join(out.split())
    assert err == ""
    for word in words:
        assert word in text


def test_every_option_says_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    import typer

    for name, command in typer.main.get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{name} {parameter.name} has no help"


def test_options_that_say_the_same_are_declared_once() -> None:
    """In flags.py: two copies of a sentence become two sentences."""
    import typer

    declared: dict[str, tuple[str, object]] = {}
    for info in cli.app.registered_commands:
        assert info.callback is not None
        for name, hint in get_type_hints(info.callback, include_extras=True).items():
            for option in getattr(hint, "__metadata__", ()):
                if isinstance(option, typer.models.OptionInfo) and option.help:
                    whose, one = declared.setdefault(option.help, (f"{info.callback.__name__} {name}", option))
                    assert one is option, f"{whose} and {info.callback.__name__} {name}: put it into flags.py"
    assert len(declared) > 60


def test_no_command_prints_the_help_and_is_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "Commands:" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("distserve ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("bnech", "No such command 'bnech'"),
        ("serve --prot 1", "No such option: --prot"),
        ("serve --port x", "--port"),
        ("serve --port 70000", "--port 70000 is out of range"),
        ("serve a b", "unexpected extra argument"),
        ("serve --device gpu", "--device gpu is unknown: one of auto, cpu, cuda"),
        ("serve --block-size 7", "one of 16, 32, 64"),
        ("serve --kv-memory lots", "--kv-memory: 'lots' is not an amount of memory"),
        ("bench --rate 0", "the rate 0 must be above 0"),
        ("bench --rate nan", "the rate nan"),
        ("bench --rate 1 --rates 1,2", "keep one"),
        ("bench --rates 1;2", "such as 1,2,4"),
        ("bench --rate 1 --slo 0.25", "ttft=0.25,tpot=0.1"),
        ("bench --rate 1 --goal 90", "--goal 90 must be a share"),
        ("bench --rate 1 --endpoint chat --prompts ids", "--endpoint completions"),
        ("bench --rate 1 --endpoint edits", "one of completions, chat"),
        ("bench --rate 1 -n 0", "--requests 0"),
        ("bench --rate 1 --cv -1", "cv -1 must be 0 (fixed gaps)"),
        ("bench --rate 1 --scale 1,2,3", "--scale"),
        ("bench --rate 1 --scale 0", "scale 0 must be above 0"),
        ("bench --rate 1 --warmup -1", "--warmup -1"),
        ("bench --rate 1 --timeout 0", "--timeout 0"),
        ("bench --rate 1 --url ftp://x", "--url 'ftp://x' is no address"),
        ("bench --rate 1 --context 1", "context 1 must be at least 2"),
        ("bench --rate 1 --json no/such/folder/x.json", "--json no/such/folder/x.json: cannot be written"),
        ("bench --rate 1 -n 5 --warmup 1000", "--warmup 1000 is longer than the arrivals"),
        ("bench", "sharegpt has no arrival times: give --rate R"),
        ("bench -w sharegtp --rate 1", "did you mean sharegpt"),
        ("bench -w none.csv", "cannot read the workload none.csv: No such file"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str], arguments: str, words: str) -> None:
    assert words in refused(capsys, *arguments.split())


def test_a_wrong_plan_is_refused_before_anything_starts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "none.toml" in refused(capsys, "serve", "--plan", str(tmp_path / "none.toml"))
    plan = tmp_path / "plan.toml"
    plan.write_text('[[instances]]\nrole = "prefill"\n')
    assert "no decode" in refused(capsys, "serve", "--plan", str(plan))


def test_serve_hands_over_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from distserve.serve import launch

    asked: list[ServeOptions] = []

    def serve(options: ServeOptions) -> int:
        asked.append(options)
        return 7

    monkeypatch.setattr(launch, "serve", serve)
    monkeypatch.setenv("DISTSERVE_API_KEY", "one two")
    arguments = (
        "serve m.gguf --plan p.toml --device cpu --dtype float32 --port 0 --served-model-name a --served-model-name b"
    )
    more = "--max-model-len 100 --kv-memory 20% --block-size 16 --max-batch-tokens 9 --max-queue 5 --shutdown-timeout 1"
    assert cli.main([*arguments.split(), *more.split(), "--log-level", "debug", "--host", "0.0.0.0"]) == 7
    assert asked == [
        ServeOptions(
            model="m.gguf", plan=Path("p.toml"), device="cpu", dtype="float32", host="0.0.0.0", port=0,
            api_keys=("one", "two"), served_model_names=("a", "b"), max_model_len=100, kv_memory=0.2, block_size=16,
            max_batch_tokens=9, max_queue=5, shutdown_timeout=1.0, log_level="debug",
        )
    ]  # fmt: skip


def test_ctrl_c_is_quiet_and_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from distserve.serve import launch

    def serve(options: ServeOptions) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "serve", serve)
    assert cli.main(["serve"]) == 130
    assert capsys.readouterr() == ("", "")


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    assert min(_cpu("--help") for _ in range(3)) < 1.0  # 0.2 s on an idle core
    heavy = {"torch", "numpy", "rich", "aiohttp", "fastapi", "transformers"}
    code = f"import sys, distserve.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def _cpu(*arguments: str) -> float:
    """CPU seconds of a command: a busy machine makes it slow, not heavy."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run(*arguments).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_as_a_process() -> None:
    done = run("bench", "--workload", "missing.csv")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "distserve: error: cannot read the workload missing.csv: No such file or directory\n"


def test_a_reader_that_goes_away_is_no_crash() -> None:
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "distserve", "bench", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate(timeout=60)
    assert b"Traceback" not in err


def test_the_reference_is_up_to_date() -> None:
    root = Path(__file__).parent.parent
    made = subprocess.run([sys.executable, root / "scripts/docs.py", "-"], capture_output=True, text=True, timeout=60)
    assert made.returncode == 0, made.stderr
    assert (root / "docs/reference/cli.md").read_text() == made.stdout, "run: python scripts/docs.py"
