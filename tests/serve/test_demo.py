"""The real small model, served: the same greedy tokens as transformers, and the same answers however it is deployed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI
from tests.engine.support import MiniScheduler, load_model
from tests.engine.support import greedy as greedily
from tests.engine.test_demo import reference  # noqa: F401  # the fixture: a plain transformers model of the same weights
from tests.serve.live import Server, serving

from distserve.engine import hub
from distserve.serve.http.tokens import load_tokenizer

pytestmark = [
    pytest.mark.skipif(not hub.demo_path().exists(), reason="the demo model is not here; `make setup` fetches it"),
    pytest.mark.slow,
    pytest.mark.timeout(600),
]

MODEL = "smollm2-135m-instruct"
NUM_TOKENS = 12
PLANS = {
    "disaggregated": '[[instances]]\nrole = "prefill"\n[[instances]]\nrole = "decode"\n',
    "chunked": '[[instances]]\nrole = "colocated"\nchunk_tokens = 300\n',
    "several degrees": """
[[instances]]
role = "prefill"
tp = 3
[[instances]]
role = "prefill"
pp = 2
[[instances]]
role = "decode"
[[instances]]
role = "decode"
tp = 3
pp = 2
""",
    "7 stages of 30 layers": """
[[instances]]
role = "prefill"
pp = 7
[[instances]]
role = "decode"
pp = 3
""",
    "prefill-first": '[[instances]]\nrole = "colocated"\npolicy = "prefill-first"\n',
}


def prompts() -> list[list[int]]:
    """20 prompts of 1 to 400 ordinary tokens; `tests/engine/test_demo.py` has 50 of up to 2,000 in one process."""
    rng = random.Random(11)
    lengths = [1, 2, 31, 32, 33, 64, 400] + [int(2 ** rng.uniform(0, 7)) for _ in range(13)]
    return [[rng.randrange(100, 49_000) for _ in range(length)] for length in lengths]


def ask_all(server: Server, **fields: Any) -> list[str]:
    """Every prompt's answer, ten prompts at a time so that batches are mixed."""

    def ask(prompt: list[int]) -> str:
        fixed = {"max_tokens": NUM_TOKENS, "ignore_eos": True, "skip_special_tokens": False}
        answer = server.complete(prompt, **fixed, **fields)
        assert answer["usage"]["completion_tokens"] == NUM_TOKENS
        return str(answer["choices"][0]["text"])

    with ThreadPoolExecutor(10) as threads:
        return list(threads.map(ask, prompts()))


@pytest.fixture(scope="module", params=list(PLANS))
def deployment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder: Path = tmp_path_factory.mktemp(request.param)
    (folder / "plan.toml").write_text(PLANS[request.param])
    with serving(folder, "--plan", str(folder / "plan.toml"), "--dtype", "float32", "--kv-memory", "512MiB") as server:
        yield server


@pytest.fixture(scope="module")
def greedy(reference: Any) -> list[str]:  # noqa: F811
    """What transformers answers: our own tokens of one process, each of which one pass of the reference chooses."""
    tokenizer = load_tokenizer(str(hub.demo_path()))
    world = MiniScheduler(load_model(hub.demo_path(), torch.float32, 1024), num_blocks=256)
    answers = world.run([greedily(i, prompt, NUM_TOKENS) for i, prompt in enumerate(prompts())])
    found = []
    for i, prompt in enumerate(prompts()):
        answer = [token.id for token in answers[i]]
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + answer[:-1]]), logits_to_keep=NUM_TOKENS).logits[0]
        assert logits.argmax(1).tolist() == answer
        found.append(tokenizer.decode(answer, skip_special_tokens=False))
    return found


seeded: list[list[str]] = []  # the answers of each deployment; all must be equal


def test_greedy_tokens_equal_those_of_transformers(deployment: Server, greedy: list[str]) -> None:
    assert ask_all(deployment, temperature=0) == greedy


def test_seeded_sampling_is_the_same_however_it_is_deployed(deployment: Server) -> None:
    fields = {"temperature": 0.9, "top_p": 0.95, "presence_penalty": 0.5, "repetition_penalty": 1.1, "seed": 7}
    seeded.append(ask_all(deployment, **fields))
    assert seeded[-1] == seeded[0]
    assert len(set(seeded[0])) == len(prompts())


def test_the_real_client_talks_to_the_real_model(tmp_path: Path) -> None:
    """bfloat16, as `make demo` serves it."""
    fixed: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
        "max_tokens": 16,
    }
    with serving(tmp_path) as server, OpenAI(base_url=server.url + "/v1", api_key="none") as client:
        answer = client.chat.completions.create(**fixed).choices[0].message.content
        assert "Paris" in answer
        pieces = client.chat.completions.create(**fixed, stream=True)
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == answer
        assert server.total("distserve:handoffs_total") == 2
