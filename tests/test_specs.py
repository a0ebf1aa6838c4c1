"""A model's numbers out of the configurations that checkpoints come with."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.engine.support import make_checkpoint

from distserve.errors import ModelError
from distserve.specs import KVLayout, ModelSpec

LLAMA_31_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "torch_dtype": "bfloat16",
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
}


def test_llama_31_8b() -> None:
    spec = ModelSpec.from_config(LLAMA_31_8B, {"eos_token_id": [128001, 128009]})
    assert spec.num_parameters == 8_030_261_248  # as the model's card says
    assert spec.weight_bytes("bfloat16") == 2 * spec.num_parameters
    assert spec.head_dim == 128
    assert spec.max_model_len == 131072
    assert spec.eos_token_ids == (128001, 128008, 128009)
    assert spec.rope_scaling is not None
    assert spec.rope_scaling["rope_type"] == "llama3"
    assert spec.rope_theta == 500000.0
    assert spec.kv_layout(32, "bfloat16").token_bytes == 131072
    assert spec.kv_layout(32, "bfloat16").block_bytes == 32 * 131072


def test_smollm2_135m() -> None:
    config = {
        **LLAMA_31_8B,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "rope_scaling": None,
        "tie_word_embeddings": True,
    }
    assert ModelSpec.from_config(config).num_parameters == 134_515_008


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
def test_parameters_are_those_that_transformers_counts(changes: dict[str, Any], tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, **changes)
    spec = ModelSpec.from_config(json.loads((tmp_path / "config.json").read_text()))
    assert spec.num_parameters == model.num_parameters()


SMALL = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
OTHERS: dict[str, dict[str, Any]] = {
    "OPT": {**SMALL, "ffn_dim": 160, "word_embed_proj_dim": 64, "max_position_embeddings": 40},
    "GPT2": {"vocab_size": 96, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 40},
    "Qwen2": {**SMALL, "intermediate_size": 160, "num_key_value_heads": 2},
    "Qwen3": {**SMALL, "intermediate_size": 160, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("family", OTHERS)
def test_families_that_are_planned_only_count_as_transformers_does(family: str) -> None:
    """Also what `to_dict` writes is read: that is what a saved config.json holds."""
    config = getattr(transformers, f"{family}Config")(**OTHERS[family])
    with torch.device("meta"):
        model = getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")(config)
    spec = ModelSpec.from_config(json.loads(config.to_json_string(use_diff=False)))
    assert spec.num_parameters == model.num_parameters()
    assert spec.max_model_len == config.max_position_embeddings
    assert spec.family == family.lower()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "opt", "ffn_dim": 64, "enable_bias": False}, "without biases"),
        (
            {"model_type": "opt", "ffn_dim": 64, "activation_function": "silu"},
            "'silu'; supported for its family: 'relu'",
        ),
        ({"model_type": "qwen2", "intermediate_size": 64, "use_sliding_window": True}, "some of its layers"),
        ({"model_type": "gpt2"}, "no number 'intermediate_size'"),
    ],
)
def test_what_the_numbers_cannot_describe_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        ModelSpec.from_config({**SMALL, "n_inner": "x", **changes})


def test_rope_is_read_in_both_notations() -> None:
    new = {**LLAMA_31_8B, "rope_parameters": {**LLAMA_31_8B["rope_scaling"], "rope_theta": 500000.0}}
    del new["rope_theta"], new["rope_scaling"]
    assert ModelSpec.from_config(new) == ModelSpec.from_config(LLAMA_31_8B)
    plain = {**new, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
    assert ModelSpec.from_config(plain).rope_scaling is None
    assert ModelSpec.from_config(plain).rope_theta == 7.0
    old = {**LLAMA_31_8B, "rope_scaling": {"type": "linear", "factor": 2.0}, "max_position_embeddings": 4096}
    assert ModelSpec.from_config(old).rope_scaling == {"rope_type": "linear", "factor": 2.0}
    assert ModelSpec.from_config(old).max_model_len == 8192
    yarn = {**old, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    assert ModelSpec.from_config(yarn).max_model_len == 16384


def test_llama_3_in_gguf_is_scaled_as_its_factors_say() -> None:
    """The factors as llama.cpp's converter computes them from the scaling above."""
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.context_length": 131072,
        "llama.embedding_length": 256,
        "llama.feed_forward_length": 512,
        "llama.attention.head_count": 2,
        "llama.rope.freq_base": 500000.0,
    }
    shapes = {"token_embd.weight": (1000, 256)}
    factors = []
    for i in range(64):
        wavelength = 2 * math.pi * 500000.0 ** (2 * i / 128)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(8.0)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / 8 + smooth))
    spec = ModelSpec.from_gguf(metadata, shapes, factors)
    assert spec.rope_scaling == LLAMA_31_8B["rope_scaling"]
    assert spec.num_kv_heads == 2
    assert spec.tied_embeddings
    assert ModelSpec.from_gguf(metadata, shapes).rope_scaling is None
    with pytest.raises(ModelError, match="otherwise than Llama 3"):
        ModelSpec.from_gguf(metadata, shapes, [1.0, 2.0] * 32)
    with pytest.raises(ModelError, match="rotates 64 of 128"):
        ModelSpec.from_gguf({**metadata, "llama.rope.dimension_count": 64}, shapes)
    linear = {**metadata, "llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert ModelSpec.from_gguf(linear, shapes).rope_scaling == {"rope_type": "linear", "factor": 4.0}


def test_mistral_has_a_window_unless_it_says_otherwise() -> None:
    mistral = {**LLAMA_31_8B, "model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    assert ModelSpec.from_config(mistral).sliding_window == 4096
    assert ModelSpec.from_config({**mistral, "sliding_window": None}).sliding_window is None
    assert ModelSpec.from_config({**LLAMA_31_8B, "sliding_window": 77}).sliding_window is None
    assert ModelSpec.from_config(mistral).family == "llama"


def test_what_is_missing_or_absurd_is_named() -> None:
    with pytest.raises(ModelError, match="model type None"):
        ModelSpec.from_config({})
    with pytest.raises(ModelError, match="no number 'vocab_size'"):
        ModelSpec.from_config({**LLAMA_31_8B, "vocab_size": "many"})
    with pytest.raises(ModelError, match="num_layers = 0; at least 1"):
        ModelSpec.from_config({**LLAMA_31_8B, "num_hidden_layers": 0})


def test_layouts_are_equal_by_value() -> None:
    one = KVLayout(2, 3, 64, 32, "float32")
    assert one == KVLayout(2, 3, 64, 32, "float32")
    assert one.token_bytes == 2 * 2 * 3 * 64 * 4
