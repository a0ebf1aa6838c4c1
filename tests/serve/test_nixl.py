"""`--transport nixl` as a user gives it: the same answers as over shared memory, and as few of them lost."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from tests.serve.live import Server, serving, survives

from distserve.engine import hub
from distserve.errors import UsageError
from distserve.serve.launch import serve
from distserve.serve.options import ServeOptions
from distserve.transfer import agent

try:
    agent.require()
except UsageError as missing:
    pytest.skip(str(missing), allow_module_level=True)

PLAN = """
[[instances]]
role = "prefill"
count = 2
tp = 3

[[instances]]
role = "decode"
count = 2
pp = 2
"""


def is_quiet(server: Server) -> bool:
    """Nothing in the log that NIXL or UCX wrote on their own."""
    return not re.search(r"\bUCX +\w+ |\.(cpp|c):\d+", server.log.read_text())


def test_answers_survive_the_death_of_either_side(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(PLAN)
    options = ("--plan", str(tmp_path / "plan.toml"), "--kv-memory", "8MiB", "--transport", "nixl")
    with serving(tmp_path, "fake:step=0.01", *options) as server:
        good = [server.text(f"story {i}", max_tokens=40, seed=i) for i in range(3)]
        for victim in ("prefill-0", "decode-1"):
            survives(server, victim, max_tokens=40)
        assert [server.text(f"story {i}", max_tokens=40, seed=i) for i in range(3)] == good
        server.wait_for("all blocks free", server.idle, within=5)
        assert server.total("distserve:digest_failures_total") == 0
        assert is_quiet(server)
    assert is_quiet(server)


@pytest.mark.skipif(not hub.demo_path().exists(), reason="the demo model is not here; `make setup` fetches it")
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_demo_model_answers_as_over_shared_memory(tmp_path: Path) -> None:
    rng = random.Random(3)
    prompts = [[rng.randrange(100, 49_000) for _ in range(length)] for length in (1, 32, 33, 150, 700)]
    answers = {}
    for transport in ("shm", "nixl"):
        folder = tmp_path / transport
        folder.mkdir()
        options = ("--transport", transport, "--kv-memory", "256MiB", "--max-batch-tokens", "512")
        with serving(folder, *options) as server:
            answers[transport] = [server.text(prompt, max_tokens=24, ignore_eos=True) for prompt in prompts]
            assert server.total("distserve:handoffs_total") == len(prompts)
            assert server.total("distserve:pull_failures_total") == 0
            assert is_quiet(server)
    assert answers["nixl"] == answers["shm"]


def test_what_is_not_installed_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "PACKAGES", ("no_such_nixl",))
    with pytest.raises(UsageError, match=r"NIXL, which is not installed: pip install"):
        serve(ServeOptions(transport="nixl", port=0))
