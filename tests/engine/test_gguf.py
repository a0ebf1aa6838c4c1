"""GGUF files of the families that have them: read as they were written, computed as the safetensors are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.checkpoints import write_empty_gguf, write_gguf
from tests.engine.ranks import Ranks
from tests.engine.support import MiniScheduler, all_logits, greedy, load_model, make_checkpoint

from distserve.engine import hub
from distserve.errors import ModelError

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3 tied": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_gguf_file_computes_what_its_safetensors_do(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    make_checkpoint(tmp_path, family, **changes)
    file = tmp_path / "model.gguf"
    write_gguf(file, tmp_path, family.lower())
    found, wanted = hub.read_spec(file), hub.read_spec(tmp_path)
    assert found == replace(
        wanted, dtype="bfloat16", eos_token_ids=(1,), norm_eps=found.norm_eps, rope_theta=found.rope_theta
    )
    assert found.norm_eps == pytest.approx(wanted.norm_eps)
    assert found.rope_theta == pytest.approx(wanted.rope_theta)
    prompt = list(range(3, 60))
    ours, reference = load_model(file), load_model(tmp_path)
    torch.testing.assert_close(all_logits(ours, prompt), all_logits(reference, prompt), atol=1e-4, rtol=1e-4)
    with Ranks.all(file, 2, 3) as ranks:
        torch.testing.assert_close(ranks.logits(prompt), all_logits(reference, prompt), atol=1e-4, rtol=1e-4)
    answers = [MiniScheduler(model).run([greedy(1, prompt, 50)], chunk=13)[1] for model in (ours, reference)]
    assert [token.id for token in answers[0]] == [token.id for token in answers[1]]


@pytest.mark.parametrize("architecture", ["gpt2", "mamba"])
def test_a_file_of_another_architecture_names_those_that_are_served(architecture: str, tmp_path: Path) -> None:
    write_empty_gguf(tmp_path / "m.gguf", architecture)
    with pytest.raises(ModelError, match=f"architecture '{architecture}'; supported in GGUF: llama, qwen2, qwen3"):
        hub.read_spec(tmp_path / "m.gguf")
