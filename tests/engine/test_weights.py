"""Checkpoints that are wrong are refused in one line before a weight is read; ranks read their own parts only."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.engine.checkpoints import write_gguf
from tests.engine.ranks import thread_links
from tests.engine.support import CPU, all_logits, edit_config, load_model, make_checkpoint

from distserve.engine import hub, weights
from distserve.engine.base import EngineOptions
from distserve.engine.executor import LocalExecutor
from distserve.engine.gguf_file import GGUFFile
from distserve.engine.models.base import Slot, build
from distserve.engine.parallel import Member, Place, Split, sharding_of, share
from distserve.errors import ModelError, PlanError


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def truncate(path: Path, share_kept: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share_kept)])


def drop_norm(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.norm.weight"]


def add_q_norm(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(16)


def narrow_down(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(64, 95)


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing tensor": (lambda f: change_tensors(f, drop_norm), r"lacks 1 tensors, first model\.norm\.weight"),
    "wrong shape": (lambda f: change_tensors(f, narrow_down), r"down_proj\.weight of shape \[64, 95\].*\[64, 96\]"),
    "extra tensor": (lambda f: change_tensors(f, add_q_norm), r"no use for, first model\.layers\.0\.self_attn\.q_norm"),
    "truncated weights": (lambda f: truncate(f / "model.safetensors", 0.7), "truncated, fetch it again"),
    "header cut off": (lambda f: truncate(f / "model.safetensors", 0.001), "truncated, fetch it again"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"holds no \.safetensors file"),
    "no configuration": (lambda f: (f / "config.json").unlink(), r"neither config\.json nor a \.gguf file"),
    "broken configuration": (lambda f: truncate(f / "config.json", 0.5), "is not valid JSON"),
    "unknown family": (
        lambda f: edit_config(f, model_type="mamba"),
        "'mamba', which is not among the known: gpt2, llama",
    ),
    "not a generator": (
        lambda f: edit_config(f, architectures=["LlamaForSequenceClassification"]),
        "does not generate text",
    ),
    "quantized": (lambda f: edit_config(f, quantization_config={"quant_method": "awq"}), r"quantized \(awq\)"),
    "other activation": (lambda f: edit_config(f, hidden_act="gelu"), "'gelu'; supported"),
    "number missing": (lambda f: edit_config(f, num_hidden_layers=None), "no number 'num_hidden_layers'"),
    "odd heads": (lambda f: edit_config(f, num_key_value_heads=3), "4 attention heads over 3 KV heads"),
    "other rope": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "proportional", "factor": 2.0}),
        "proportional.*not supported",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_checkpoint_is_refused_in_one_line(what: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    damage, message = BROKEN[what]
    damage(tmp_path)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(hub.resolve(str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, max_shard_size="60KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=f"{shard.name}.*fetch it again"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match=r"no model\.safetensors\.index\.json"):
        load_model(tmp_path)


def test_what_older_checkpoints_saved_too_much_is_ignored(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, tie_word_embeddings=True)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    change_tensors(tmp_path, add)
    assert load_model(tmp_path).spec.tied_embeddings


def test_weights_arrive_in_the_dtype_asked_for(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    model = load_model(tmp_path, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("size", [2, 4])
def test_the_parts_of_all_ranks_make_the_whole(size: int, tmp_path: Path) -> None:
    """Of every tensor; KV heads that are fewer than the ranks are held several times."""
    make_checkpoint(tmp_path)
    model = build(hub.read_spec(tmp_path), torch.float32)
    for slot in model.slots():
        covered = np.zeros(slot.shape, dtype=int)
        for index in range(size):
            covered[share(slot.shape, slot.split, slot.units, Member(index, size))] += 1
        copies = {Split.REPLICATED: size, Split.KV_HEADS: max(1, size // slot.units)}.get(slot.split, 1)
        assert (covered == copies).all(), slot


def test_a_group_that_does_not_fit_the_model_is_refused() -> None:
    with pytest.raises(ModelError, match="tp=3 does not divide the model's 4"):
        share((64, 64), Split.COLUMN, 4, Member(0, 3))
    with pytest.raises(ModelError, match="tp=3 does not fit 2 KV heads"):
        share((32, 64), Split.KV_HEADS, 2, Member(0, 3))
    assert share((5, 8), Split.VOCABULARY, 5, Member(1, 2)) == (slice(3, 5), slice(0, 8))


def test_a_gguf_file_may_hold_several_dtypes_and_a_vocabulary(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    file = tmp_path / "model.gguf"
    write_gguf(file, tmp_path, half=("model.layers.0.mlp.up_proj.weight",))
    spec = hub.read_spec(file)
    assert spec.eos_token_ids == (1,)
    assert spec.vocab_size == 128
    prompt = list(range(3, 60))
    torch.testing.assert_close(
        all_logits(load_model(file), prompt), all_logits(load_model(tmp_path), prompt), atol=2e-2, rtol=1e-2
    )
    assert GGUFFile(file, arrays=True).metadata["tokenizer.ggml.tokens"][5] == "token5"
    assert GGUFFile(file).metadata["tokenizer.ggml.tokens"] is None


def test_a_broken_gguf_file_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    whole = tmp_path / "whole.gguf"
    write_gguf(whole, tmp_path)
    data = whole.read_bytes()
    broken = tmp_path / "broken.gguf"
    for size in [0, 3, 4, 20, 30, *range(100, len(data), len(data) // 40), len(data) - 40]:
        broken.write_bytes(data[:size])
        with pytest.raises(ModelError, match=r"truncated|empty") as caught:
            GGUFFile(broken)
        assert "\n" not in str(caught.value)
    broken.write_bytes(data[:4] + struct.pack("<I", 1) + data[8:])
    with pytest.raises(ModelError, match="version 1; versions 2 and 3"):
        GGUFFile(broken)
    broken.write_bytes(b"PK" + data[2:])
    with pytest.raises(ModelError, match="does not begin with 'GGUF'"):
        GGUFFile(broken)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kv_bytes": 100}, PlanError, "100 bytes of KV memory hold no block of 32 tokens"),
        ({"dtype": "int8"}, ModelError, "dtype 'int8' is not supported"),
        ({"max_model_len": 513}, ModelError, "513 is over the checkpoint's 512"),
        ({"device": "cuda:99"}, PlanError, "cuda:99 is not there"),
    ],
)
async def test_options_that_do_not_fit_are_refused(
    options: dict[str, object], error: type[Exception], message: str, tmp_path: Path
) -> None:
    make_checkpoint(tmp_path)
    executor = LocalExecutor(EngineOptions(str(tmp_path), **options))  # type: ignore[arg-type]
    with pytest.raises(error, match=message):
        await executor.start(lambda fraction, what: None)
    await executor.stop()


async def test_the_context_ends_where_the_kv_memory_does(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    block = hub.read_spec(tmp_path).kv_layout(32, "float32").block_bytes
    executor = LocalExecutor(EngineOptions(str(tmp_path), kv_bytes=5 * block + 7))
    await executor.start(lambda fraction, what: None)
    assert (executor.num_blocks, executor.max_model_len) == (5, 160)
    await executor.stop()


async def test_mixed_dtypes_are_refused_until_somebody_says_which_to_compute_in(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)

    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].half()

    change_tensors(tmp_path, narrow)
    executor = LocalExecutor(EngineOptions(str(tmp_path), kv_bytes=1 << 20))
    with pytest.raises(ModelError, match=r"mixes dtypes \(model\.norm\.weight as F16, model\.\S+ as F32\); say"):
        await executor.start(lambda fraction, what: None)
    await executor.stop()
    executor = LocalExecutor(EngineOptions(str(tmp_path), dtype="float32", kv_bytes=1 << 20))
    await executor.start(lambda fraction, what: None)
    await executor.stop()


def test_a_dtype_that_is_no_plain_number_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)

    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)

    change_tensors(tmp_path, quantize)
    with pytest.raises(ModelError, match=r"holds model\.norm\.weight as F8_E4M3.*BF16, F16, F32, F64"):
        load_model(tmp_path)


@pytest.mark.parametrize("shard", ["5GB", "60KB"])
def test_a_rank_reads_its_slices_and_lets_go_of_what_it_read(
    shard: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_checkpoint(tmp_path, max_shard_size=shard)
    monkeypatch.setattr(weights, "_KEPT", 0)  # files are reopened after every module
    spec, read = hub.read_spec(tmp_path), [0]
    place = Place(sharding_of(spec, 2, 3), 3)
    (links,) = thread_links([place])
    model = build(spec, torch.float32, place, links)
    original = weights.SafetensorsCheckpoint.read

    def count(self: weights.SafetensorsCheckpoint, slot: Slot, slices: tuple[slice, ...], into: torch.Tensor) -> None:
        read[0] += into.numel()
        original(self, slot, slices, into)

    monkeypatch.setattr(weights.SafetensorsCheckpoint, "read", count)
    weights.load(tmp_path, model, CPU)
    assert read[0] == sum(parameter.numel() for parameter in model.parameters())
    stored = load_file(tmp_path / "model.safetensors") if shard == "5GB" else {}
    assert not stored or torch.equal(
        model.get_parameter("layers.1.down.weight"), stored["model.layers.1.mlp.down_proj.weight"][:, 48:]
    )


def test_loading_reports_progress(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    model = build(hub.read_spec(tmp_path), torch.float32)
    fractions: list[float] = []
    weights.load(tmp_path, model, CPU, fractions.append)
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


def test_index_that_lies(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, max_shard_size="60KB")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weights": {}}))
    with pytest.raises(ModelError, match="cannot be read"):
        load_model(tmp_path)
