"""Known models: their published sizes, and what an unknown name is answered."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers

from distserve.catalogue import model_names, model_spec
from distserve.errors import ModelError

# Parameters as the models' cards and their checkpoints' indices say.
PUBLISHED = {
    "facebook/opt-125m": 125_239_296,
    "facebook/opt-1.3b": 1_315_758_080,
    "facebook/opt-6.7b": 6_658_473_984,
    "facebook/opt-13b": 12_853_473_280,
    "facebook/opt-30b": 29_974_540_288,
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-405B": 405_853_388_800,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "demo": 134_515_008,
}


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_known_models_have_their_published_sizes(name: str, parameters: int) -> None:
    assert model_spec(name).num_parameters == parameters


def test_every_name_is_described() -> None:
    for name in model_names():
        spec = model_spec(name)
        assert spec.num_layers > 1, name
        assert spec.eos_token_ids, name
        assert spec.head_dim * spec.num_heads >= spec.hidden_size, name


@pytest.mark.parametrize(
    "name", ["facebook/opt-66b", "openai-community/gpt2-large", "Qwen/Qwen2.5-3B", "Qwen/Qwen3-4B"]
)
def test_whole_models_count_as_transformers_does(name: str) -> None:
    table = json.loads(resources.files("distserve").joinpath("data", "models.json").read_text())["models"][name]
    config = transformers.AutoConfig.for_model(**table)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert model_spec(name).num_parameters == model.num_parameters()


def test_a_folder_and_a_gguf_file_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(transformers.LlamaConfig(num_hidden_layers=3).to_json_string(use_diff=False))
    assert model_spec(str(tmp_path)).num_layers == 3
    assert model_spec(str(tmp_path)).num_parameters == model_spec("meta-llama/Llama-2-7b-hf").num_parameters - 29 * (
        4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    )
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for key, value in {
        "block_count": 2,
        "context_length": 64,
        "embedding_length": 32,
        "feed_forward_length": 48,
    }.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_uint32("llama.attention.head_count", 4)
    writer.add_tensor("token_embd.weight", np.zeros((100, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    spec = model_spec(str(tmp_path / "m.gguf"))
    assert (spec.num_layers, spec.num_kv_heads, spec.vocab_size) == (2, 4, 100)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("opt-13b", ["'opt-13b'", "did you mean facebook/opt-13b?"]),
        ("acme/Llama-3.1-8B", ["did you mean meta-llama/Llama-3.1-8B?"]),
        ("facebook/opt-14b", ["did you mean facebook/opt-13b", "config.json"]),
        ("nothing-like-it", ["give a hub id of docs/reference/models.md", "config.json"]),
        ("there-is-no.gguf", ["cannot read there-is-no.gguf"]),
    ],
)
def test_unknown_names_are_answered_with_the_cure(name: str, words: list[str]) -> None:
    with pytest.raises(ModelError) as caught:
        model_spec(name)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


def test_names_are_found_in_any_case() -> None:
    assert model_spec("META-llama/llama-3.1-8b") is not None
    assert model_spec("Facebook/OPT-13B") == model_spec("facebook/opt-13b")


@pytest.mark.parametrize(("text", "words"), [("{", "not valid JSON"), ("[]", "no JSON object"), (None, "cannot read")])
def test_a_broken_folder_is_named(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=words):
        model_spec(str(tmp_path))
