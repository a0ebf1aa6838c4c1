"""GGUF files of the families that have them: read as they were written, computed as the safetensors are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
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


def write_gguf(path: Path, folder: Path, architecture: str) -> None:
    """The checkpoint in `folder` as llama.cpp's converter writes it; matrices in fp32."""
    spec = hub.read_spec(folder)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(spec.num_layers)
    writer.add_context_length(spec.max_model_len)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_feed_forward_length(spec.ffn_size)
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_rope_freq_base(spec.rope_theta)
    if architecture == "qwen3":
        writer.add_key_length(spec.head_dim)
        writer.add_value_length(spec.head_dim)
    if architecture == "llama":
        writer.add_rope_dimension_count(spec.head_dim)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], spec.num_layers)
    for name, tensor in load_file(folder / "model.safetensors").items():
        heads = {"q_proj": spec.num_heads, "k_proj": spec.num_kv_heads}.get(name.split(".")[-2])
        if heads and architecture == "llama":
            tensor = tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None
        writer.add_tensor(stored, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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


def test_a_file_of_another_architecture_names_those_that_are_served(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="architecture 'gpt2'; supported in GGUF: llama, qwen2, qwen3"):
        hub.read_spec(tmp_path / "m.gguf")
