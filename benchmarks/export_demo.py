"""Writes a Llama GGUF as a Hugging Face folder, so that peers can serve the very weights that we serve.

Dequantises with the gguf library and undoes llama.cpp's permutation of the query and key rows; written without our own
reader on purpose, so that equal answers of ours and a peer's say something about both.

    python -m benchmarks.export_demo OUT [--gguf FILE] [--dtype bfloat16]

Without --gguf the demo model's file is used (fetched if need be, as `make setup` does).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL = 3  # GGUF's token type of <|im_start|> and its like


def hf_name(name: str) -> str:
    """blk.7.attn_q.weight -> model.layers.7.self_attn.q_proj.weight"""
    if name.startswith("blk."):
        _, layer, part, kind = name.split(".")
        return f"model.layers.{layer}.{LAYER[part]}.{kind}"
    part, kind = name.split(".")
    return f"{TOP[part]}.{kind}"


def unpermuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """[heads * D, C] from llama.cpp's interleaved rotary pairs back to Hugging Face's two halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def weights(reader: gguf.GGUFReader, heads: int, kv_heads: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if ".attn_q." in tensor.name:
            values = unpermuted(values, heads)
        elif ".attn_k." in tensor.name:
            values = unpermuted(values, kv_heads)
        out[hf_name(tensor.name)] = torch.from_numpy(np.array(values, dtype=np.float32)).to(dtype).contiguous()
    return out


def write_tokenizer(out: Path, fields: dict[str, object]) -> None:
    tokens = fields["tokenizer.ggml.tokens"]
    types = fields["tokenizer.ggml.token_type"]
    merges = fields["tokenizer.ggml.merges"]
    assert isinstance(tokens, list)
    assert isinstance(types, list)
    assert isinstance(merges, list)
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    # llama.cpp's pre-tokenizer "smollm": every digit alone, then GPT-2's pattern over bytes.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL])
    tokenizer.save(str(out / "tokenizer.json"))

    def named(key: str) -> object:
        index = fields[f"tokenizer.ggml.{key}_token_id"]
        assert isinstance(index, int)
        return tokens[index]

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": named("bos"),
        "eos_token": named("eos"),
        "unk_token": named("unknown"),
        "pad_token": named("padding"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "chat_template": fields["tokenizer.chat_template"],
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def write_config(out: Path, fields: dict[str, object], dtype: str) -> None:
    heads = fields["llama.attention.head_count"]
    hidden = fields["llama.embedding_length"]
    assert isinstance(heads, int)
    assert isinstance(hidden, int)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "vocab_size": fields["llama.vocab_size"],
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": fields["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": fields["llama.rope.freq_base"],
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "torch_dtype": dtype,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2))
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    (out / "generation_config.json").write_text(json.dumps(ends, indent=2))


def export(file: Path, out: Path, dtype: str) -> None:
    """Writes `out`: config, tokenizer and one safetensors file. The folder may exist; its files are replaced."""
    reader = gguf.GGUFReader(file)
    fields: dict[str, object] = {name: field.contents() for name, field in reader.fields.items()}
    out.mkdir(parents=True, exist_ok=True)
    heads, kv_heads = (fields[f"llama.attention.{key}"] for key in ("head_count", "head_count_kv"))
    assert isinstance(heads, int)
    assert isinstance(kv_heads, int)
    tensors = weights(reader, heads, kv_heads, getattr(torch, dtype))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(out, fields)
    write_config(out, fields, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gguf", type=Path, help="a GGUF file of the llama architecture (default: the demo model)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    arguments = parser.parse_args()
    file = arguments.gguf
    if file is None:
        from distserve.engine.hub import resolve

        file = Path(resolve("demo"))
    export(file, arguments.out, arguments.dtype)
    print(f"{arguments.out}: {arguments.dtype} weights, tokenizer and configuration of {file.name}")


if __name__ == "__main__":
    main()
