"""Our models against transformers', family by family: logits, and greedy tokens over hundreds of steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.engine.oracle import distance
from tests.engine.support import (
    CPU,
    MiniScheduler,
    all_logits,
    edit_config,
    greedy,
    load_model,
    make_checkpoint,
    reference_tokens,
)
from torch import Tensor

from distserve import specs
from distserve.engine import hub, kernels
from distserve.engine.kv_cache import KVCache, private_buffer
from distserve.engine.layers import StepLayout
from distserve.engine.models.base import Model
from distserve.errors import ModelError

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}

# Both change beyond 128 tokens; greedy decoding goes there.
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 128,
    "factor": 4.0,
    "short_factor": [1.0 + 0.05 * i for i in range(8)],
    "long_factor": [1.0 + 0.5 * i for i in range(8)],
}

OPT = {"num_key_value_heads": None, "ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.2}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gqa": ("Llama", {}),
    "mha": ("Llama", {"num_key_value_heads": 4}),
    "mqa": ("Llama", {"num_key_value_heads": 1}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "wide heads": ("Llama", {"head_dim": 32}),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3 rope": ("Llama", {"rope_parameters": LLAMA3}),
    "linear rope": ("Llama", {"rope_parameters": LINEAR}),
    "yarn rope": ("Llama", {"rope_parameters": YARN}),
    "dynamic rope": ("Llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 128}),
    "long rope": ("Llama", {"rope_parameters": LONG}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral window": ("Mistral", {"sliding_window": 24}),
    "sharded": ("Llama", {"max_shard_size": "60KB"}),
    "qwen2": ("Qwen2", {}),
    "qwen2 tied, sharded": ("Qwen2", {"tie_word_embeddings": True, "max_shard_size": "60KB"}),
    "qwen2 dynamic rope": ("Qwen2", {"rope_parameters": DYNAMIC, "max_position_embeddings": 128}),
    "qwen2 yarn rope": ("Qwen2", {"rope_parameters": YARN}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3 tied, sharded": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True, "max_shard_size": "60KB"}),
    "qwen3 biases": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "gpt2": ("GPT2", {}),
    "gpt2 untied, sharded": ("GPT2", {"tie_word_embeddings": False, "max_shard_size": "60KB"}),
    "gpt2 inner": ("GPT2", {"n_inner": 90}),
    "opt": ("OPT", OPT),
    "opt 350m": ("OPT", {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 40}),
    "opt norms after": ("OPT", {**OPT, "do_layer_norm_before": False}),
    "opt untied, sharded": ("OPT", {**OPT, "tie_word_embeddings": False, "max_shard_size": "60KB"}),
}
FAMILIES = ("gqa", "qwen2", "qwen3", "opt", "opt 350m", "gpt2", "gpt2 inner")  # a case of each family


def checkpoint(folder: Path, case: str, **more: Any) -> Any:
    """The transformers model of a case, saved in `folder`."""
    family, changes = CASES[case][0], {**CASES[case][1], **more}
    if family != "GPT2":
        return make_checkpoint(folder, family, **changes)
    shard = changes.get("max_shard_size", "5GB")
    options = {key: value for key, value in changes.items() if key != "max_shard_size"}
    shape = {"vocab_size": 128, "n_positions": 512, "n_embd": 64, "n_layer": 3, "n_head": 4, "eos_token_id": 1}
    torch.manual_seed(0)
    config = transformers.GPT2Config(**{**shape, **options}, bos_token_id=0, initializer_range=0.2)
    model = transformers.GPT2LMHeadModel(config).float().eval()
    for name, parameter in model.named_parameters():  # norms and biases begin as constants: make them matter
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.2)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def pool(model: Model, num_blocks: int) -> KVCache:
    layout = model.spec.kv_layout(16, "bfloat16")
    return KVCache(layout, num_blocks, private_buffer(num_blocks * layout.block_bytes), CPU)


def logits(model: Model, kv: KVCache, work: list[tuple[list[int], int, list[int]]]) -> Tensor:
    """Of every token; `work`: (tokens of this step, tokens before them, blocks) of each sequence."""
    lens = [len(tokens) for tokens, _, _ in work]
    contexts = [len(tokens) + before for tokens, before, _ in work]
    step = StepLayout.build(lens, contexts, [blocks for _, _, blocks in work], 16)
    ids = torch.tensor([token for tokens, _, _ in work for token in tokens], dtype=torch.int32)
    with torch.inference_mode():
        return model.logits(model(ids, step, kv.layers, None))


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens_equal_those_of_transformers(case: str, tmp_path: Path) -> None:
    reference = checkpoint(tmp_path, case)
    model = load_model(tmp_path)
    prompt = torch.randint(3, 128, (77,), generator=torch.Generator().manual_seed(2)).tolist()
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(all_logits(model, prompt), expected, atol=1e-4, rtol=1e-4)

    tokens = MiniScheduler(model).run([greedy(1, prompt, 200)])[1]
    assert [token.id for token in tokens] == reference_tokens(reference, prompt, 200)


@pytest.mark.parametrize("case", FAMILIES)
def test_a_mixed_batch_answers_as_each_alone(case: str, tmp_path: Path) -> None:
    reference = checkpoint(tmp_path, case)
    model = load_model(tmp_path)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 128, (n,), generator=generator).tolist() for n in (1, 2, 15, 16, 17, 90, 33)]
    requests = [greedy(i, prompt, 20 + i) for i, prompt in enumerate(prompts)]
    tokens = MiniScheduler(model).run(requests, chunk=13)
    for i, prompt in enumerate(prompts):
        assert [token.id for token in tokens[i]] == reference_tokens(reference, prompt, 20 + i)


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_and_whole_prefill_agree_bit_by_bit(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint(tmp_path, case)
    model = load_model(tmp_path, dtype)
    prompt = torch.randint(3, 128, (100,), generator=torch.Generator().manual_seed(4)).tolist()
    answers = [
        [token.id for token in MiniScheduler(model).run([greedy(1, prompt, 50)], chunk)[1]]
        for chunk in (1 << 30, 7, 32)
    ]
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("case", FAMILIES)
def test_a_sequence_does_not_notice_its_batch_nor_how_it_was_cut(case: str, tmp_path: Path) -> None:
    """To the last bit of its logits, where our own kernels multiply."""
    library = kernels.load()
    if library is None or not library.packs:
        pytest.skip("this processor has no bf16 vectors: a library multiplies, which promises no equal bits")
    checkpoint(tmp_path, case)
    model = load_model(tmp_path, torch.bfloat16)
    generator = torch.Generator().manual_seed(5)
    prompt, other = (torch.randint(3, 128, (n,), generator=generator).tolist() for n in (100, 64))
    blocks, others = [4, 1, 7, 2, 9, 8, 0], [20, 21, 22, 23]
    kvs = [pool(model, 24) for _ in range(2)]
    whole = logits(model, kvs[0], [(prompt, 0, blocks)])
    parts = []
    for number, (first, last) in enumerate([(0, 31), (31, 32), (32, 99), (99, 100)]):
        work = [(other[: 15 * number + 1], 0, others), (prompt[first:last], first, blocks)]
        parts.append(logits(model, kvs[1], work)[15 * number + 1 :])
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.1)])
def test_half_precision_is_close_to_full(case: str, dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    reference = checkpoint(tmp_path, case)
    prompt = torch.randint(3, 128, (77,), generator=torch.Generator().manual_seed(2)).tolist()
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0]
    assert distance(all_logits(load_model(tmp_path, dtype), prompt), expected) < tolerance


def test_a_retry_goes_on_where_the_first_attempt_ended(tmp_path: Path) -> None:
    """With sampling: token i depends on the seed and i alone."""
    make_checkpoint(tmp_path)
    model = load_model(tmp_path)
    whole = greedy(1, range(3, 40), 30)
    from dataclasses import replace

    sampling = replace(whole.sampling, temperature=1.0, seed=7, presence_penalty=0.5, repetition_penalty=1.1)
    whole = replace(whole, sampling=sampling, output=[])
    tokens = [token.id for token in MiniScheduler(model).run([whole])[1]]
    assert whole.output == tokens
    retried = replace(whole, output=tokens[:11])
    assert [token.id for token in MiniScheduler(model).run([retried])[1]] == tokens[11:]


def test_a_gpt2_as_openai_saved_it(tmp_path: Path) -> None:
    """Names without the output head's prefix, the causal mask stored beside the weights."""
    reference = checkpoint(tmp_path, "gpt2")
    file = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 512, 512) for i in range(3)}
    save_file(tensors, file, {"format": "pt"})
    prompt = list(range(3, 60))
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(all_logits(load_model(tmp_path), prompt), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("gpt2", {"activation_function": "gelu"}, "'gelu'; GPT-2 is served with 'gelu_new' only"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "attention of another kind"),
        ("gpt2", {"scale_attn_weights": False}, "attention of another kind"),
        ("gpt2", {"n_inner": 80}, r"c_fc\.weight of shape \[64, 256\].*\[64, 80\]"),
        ("gpt2", {"architectures": ["GPT2DoubleHeadsModel"]}, "does not generate text"),
        ("opt", {"num_key_value_heads": 2}, "4 attention heads over 2 KV heads"),
        ("qwen2", {"use_sliding_window": True}, "some of its layers"),
    ],
)
def test_what_a_family_cannot_compute_is_refused(
    case: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    checkpoint(tmp_path, case)
    edit_config(tmp_path, **changes)
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path)


def test_a_family_without_a_module_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    monkeypatch.setitem(specs.FAMILIES, "llama", "alpaca")
    with pytest.raises(ModelError, match="'alpaca' can be planned, but not served yet; served: gpt2, llama, opt"):
        hub.read_spec(tmp_path)
