"""GGUF files made of the checkpoints of `support.make_checkpoint`, as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import gguf
import numpy as np
from safetensors.torch import load_file

from distserve.engine import hub


def write_gguf(path: Path, folder: Path, architecture: str = "llama", half: Collection[str] = ()) -> None:
    """Of the checkpoint in `folder`, with a vocabulary. The tensors named in `half` (as safetensors name them) are
    stored in fp16, all others in fp32."""
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
    writer.add_token_list([f"token{i}" for i in range(spec.vocab_size)])
    writer.add_token_types([1] * spec.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], spec.num_layers)
    for name, tensor in load_file(folder / "model.safetensors").items():
        heads = {"q_proj": spec.num_heads, "k_proj": spec.num_kv_heads}.get(name.split(".")[-2])
        if heads and architecture == "llama":  # whose rows llama.cpp orders for a rope of its own
            tensor = tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None
        values = np.ascontiguousarray(tensor.numpy())
        writer.add_tensor(stored, values.astype(np.float16) if name in half else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_empty_gguf(path: Path, architecture: str) -> None:
    """A file that names its architecture and nothing else."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
