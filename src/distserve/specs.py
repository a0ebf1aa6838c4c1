"""The shape of a model and of its KV, in numbers that need no checkpoint: what the engine builds, the planner weighs
and a transport moves. Knows no tensor and no file; it is read out of a configuration that somebody else has loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distserve.errors import ModelError

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

# `model_type` of a Hugging Face configuration -> its family: the name of a module of `engine/models/`, where that is
# written. A model whose family has none can be planned, but not served.
FAMILIES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "opt": "opt", "gpt2": "gpt2"}

GGUF_FAMILIES = ("llama", "qwen2", "qwen3")  # whose GGUF files can be read; the last two rotate halves, not pairs

# Where a model type says it in other words than most: its key -> the common one.
_WORDS = {
    "opt": {"ffn_dim": "intermediate_size", "activation_function": "hidden_act"},
    "gpt2": {
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_embd": "hidden_size",
        "n_inner": "intermediate_size",
        "n_positions": "max_position_embeddings",
        "layer_norm_epsilon": "rms_norm_eps",
        "activation_function": "hidden_act",
    },
}
_ACTIVATIONS = {"opt": ("relu",), "gpt2": ("gelu_new", "gelu", "gelu_pytorch_tanh")}  # of families that are not gated

Config = Mapping[str, Any]  # a parsed config.json, or a GGUF file's metadata


@dataclass(frozen=True, slots=True)
class KVLayout:
    """How one instance lays out KV: block-major, `[block][layer][k|v][head][token][dim]`.
    Equal layouts copy whole blocks."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int  # tokens
    dtype: str  # "bfloat16", "float16", "float32"

    @property
    def itemsize(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def token_bytes(self) -> int:
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * self.itemsize

    @property
    def block_bytes(self) -> int:
        return self.token_bytes * self.block_size


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only transformer. Counts are of the whole model, whatever a rank holds of it."""

    family: str  # a value of FAMILIES
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    ffn_size: int
    vocab_size: int
    max_model_len: int  # tokens of context the checkpoint was made for
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None  # Hugging Face's words: rope_type, factor, ...
    sliding_window: int | None = None  # a token attends to this many last ones, itself included
    tied_embeddings: bool = False  # the output head is the embedding
    attention_bias: bool = False  # of queries, keys, values and output
    qkv_bias: bool = False  # of queries, keys and values only
    qk_norm: bool = False  # an RMS norm of each head's queries and keys
    mlp_bias: bool = False
    gated_mlp: bool = True  # three matrices (gate, up, down); else two (up, down)
    layer_norm: bool = False  # norms have a bias, too (LayerNorm); else RMS norms
    norm_after: bool = False  # norms follow attention and MLP, on the sum with the residual stream; none is last
    position_rows: int = 0  # rows of the table of learned positions; 0: rotary
    embedding_size: int = 0  # of a token's vector, projected to the hidden size and back before the head; 0: the same
    dtype: str = "bfloat16"  # the checkpoint's own
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "num_kv_heads", "head_dim", "hidden_size", "ffn_size", "vocab_size"):
            if getattr(self, name) < 1:
                raise ModelError(
                    f"the checkpoint's configuration says {name} = {getattr(self, name)}; at least 1 is needed"
                )
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"the checkpoint's configuration says {self.num_heads} attention heads over {self.num_kv_heads} KV "
                "heads; the first must be a multiple of the second"
            )

    @property
    def num_parameters(self) -> int:
        last_norm = 0 if self.norm_after else self.hidden_size * (2 if self.layer_norm else 1)
        tables = self.vocab_size * (self.embedding_size or self.hidden_size) * (1 if self.tied_embeddings else 2)
        tables += (self.position_rows + 2 * self.embedding_size) * self.hidden_size
        return tables + self.num_layers * (self.layer_matrices + self.layer_vectors) + last_norm

    @property
    def layer_matrices(self) -> int:
        """Parameters of one layer's matrices, which ranks of a tensor-parallel group share."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return self.hidden_size * (2 * q + 2 * kv + (3 if self.gated_mlp else 2) * self.ffn_size)

    @property
    def layer_vectors(self) -> int:
        """Parameters of one layer's biases and norms."""
        qkv = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        count = 2 * self.hidden_size * (2 if self.layer_norm else 1) + (2 * self.head_dim if self.qk_norm else 0)
        if self.attention_bias or self.qkv_bias:
            count += qkv + (self.hidden_size if self.attention_bias else 0)
        if self.mlp_bias:
            count += (2 if self.gated_mlp else 1) * self.ffn_size + self.hidden_size
        return count

    def weight_bytes(self, dtype: str) -> int:
        return self.num_parameters * DTYPE_BYTES[dtype]

    def kv_layout(self, block_size: int, dtype: str) -> KVLayout:
        return KVLayout(self.num_layers, self.num_kv_heads, self.head_dim, block_size, dtype)

    @classmethod
    def from_config(cls, config: Config, generation: Config | None = None) -> ModelSpec:
        """From a Hugging Face config.json; `generation`, its generation_config.json, knows more end-of-sequence tokens.
        Raises `ModelError` where a family or a feature is not supported, or a number is missing."""
        family = _family(config)
        config = _common_words(config)
        heads, hidden = _number(config, "num_attention_heads"), _number(config, "hidden_size")
        rope, theta = _rope(config)
        _refuse(config, family)
        old = family in _ACTIVATIONS  # as transformers were in 2019: learned positions, biases, LayerNorm, not gated
        context = int(config.get("max_position_embeddings") or 2048)
        return cls(
            family=family,
            num_layers=_number(config, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            hidden_size=hidden,
            ffn_size=_number(config, "intermediate_size"),
            vocab_size=_number(config, "vocab_size"),
            max_model_len=_context(context, rope),
            norm_eps=float(config.get("rms_norm_eps", 1e-5 if old else 1e-6)),
            rope_theta=theta,
            rope_scaling=rope,
            sliding_window=config.get("sliding_window", 4096) if config["model_type"] == "mistral" else None,
            tied_embeddings=bool(config.get("tie_word_embeddings", old)),
            attention_bias=old or bool(config.get("attention_bias", False)),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            mlp_bias=old or bool(config.get("mlp_bias", False)),
            gated_mlp=not old,
            layer_norm=old,
            norm_after=family == "opt" and not config.get("do_layer_norm_before", True),
            position_rows=0 if not old else context + (2 if family == "opt" else 0),  # OPT's first two pad
            embedding_size=_embedding_size(config, hidden) if family == "opt" else 0,
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch."),
            eos_token_ids=_ids(config.get("eos_token_id"), (generation or {}).get("eos_token_id")),
        )

    @classmethod
    def from_gguf(
        cls, metadata: Config, shapes: Mapping[str, Sequence[int]], rope_factors: Sequence[float] | None = None
    ) -> ModelSpec:
        """From a GGUF file's metadata, the shapes of its tensors (row-major, as PyTorch writes them) and the values of
        its tensor rope_freqs.weight, where it has one. Raises `ModelError`. The dtype is bfloat16: quantized weights
        are computed in it."""
        family = metadata.get("general.architecture")
        if family not in GGUF_FAMILIES:
            known = ", ".join(GGUF_FAMILIES)
            raise ModelError(f"this GGUF file is of architecture {family!r}; supported in GGUF: {known}")

        def get(key: str, otherwise: Any = None) -> Any:
            return metadata.get(f"{family}.{key}", otherwise)

        def number(key: str) -> int:
            return _number(metadata, f"{family}.{key}")

        heads, hidden = number("attention.head_count"), number("embedding_length")
        head_dim = int(get("attention.key_length") or hidden // heads)
        rotated = int(get("rope.dimension_count") or head_dim)
        if rotated != head_dim:
            raise ModelError(f"this GGUF file rotates {rotated} of {head_dim} dimensions a head; supported: all")
        if "token_embd.weight" not in shapes:
            raise ModelError("this GGUF file has no tensor token_embd.weight; it is truncated, fetch it again")
        theta = float(get("rope.freq_base", 10000.0))
        rope = _gguf_rope(get) if rope_factors is None else _llama3_rope(rope_factors, theta, head_dim)
        return cls(
            family=family,
            num_layers=number("block_count"),
            num_heads=heads,
            num_kv_heads=int(get("attention.head_count_kv") or heads),
            head_dim=head_dim,
            hidden_size=hidden,
            ffn_size=number("feed_forward_length"),
            vocab_size=int(shapes["token_embd.weight"][0]),
            max_model_len=number("context_length"),
            norm_eps=float(get("attention.layer_norm_rms_epsilon", 1e-6)),
            rope_theta=theta,
            rope_scaling=rope,
            sliding_window=get("attention.sliding_window"),
            tied_embeddings="output.weight" not in shapes,
            attention_bias="blk.0.attn_q.bias" in shapes and (family == "llama" or "blk.0.attn_output.bias" in shapes),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            eos_token_ids=_ids(
                metadata.get("tokenizer.ggml.eos_token_id"), metadata.get("tokenizer.ggml.eot_token_id")
            ),
        )


def _family(config: Config) -> str:
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(f"the checkpoint is of model type {model_type!r}, which is not among the known: {known}")
    architectures = config.get("architectures") or []
    if architectures and not any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in architectures):
        raise ModelError(f"the checkpoint is a {architectures[0]}, which does not generate text; name a ...ForCausalLM")
    return FAMILIES[model_type]


def _common_words(config: Config) -> Config:
    """The configuration in the words that most families use."""
    words = _WORDS.get(config["model_type"], {})
    common = {words.get(key, key): value for key, value in config.items()}
    if config["model_type"] == "gpt2" and common.get("intermediate_size") is None and "hidden_size" in common:
        common["intermediate_size"] = 4 * common["hidden_size"]
    return common


def _refuse(config: Config, family: str) -> None:
    """What would load and answer wrongly."""
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ModelError(
            f"the checkpoint is quantized ({method}), which is not supported; take the original or a GGUF file"
        )
    known = _ACTIVATIONS.get(family, ("silu", "swish"))
    if (act := config.get("hidden_act", known[0])) not in known:
        raise ModelError(f"the checkpoint's activation is {act!r}; supported for its family: {known[0]!r}")
    if config.get("use_sliding_window") and family in ("qwen2", "qwen3"):
        raise ModelError("the checkpoint attends to a window in some of its layers only, which is not supported")
    if family == "opt" and (not config.get("enable_bias", True) or config.get("_remove_final_layer_norm")):
        raise ModelError("the checkpoint is an OPT without biases or without a last norm; take one of Meta's own")


def _embedding_size(config: Config, hidden: int) -> int:
    size = int(config.get("word_embed_proj_dim") or hidden)
    return 0 if size == hidden else size


def _number(config: Config, key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ModelError(f"the checkpoint's configuration has no number {key!r} (found {value!r}); is it complete?")
    return value


def _rope(config: Config) -> tuple[dict[str, Any] | None, float]:
    """(scaling, theta), from transformers 5's `rope_parameters` or the older pair of keys."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(rope.pop("rope_theta", None) or config.get("rope_theta") or 10000.0)
    kind = rope.pop("rope_type", None) or rope.get("type") or "default"
    rope.pop("type", None)
    if kind == "default":
        return None, theta
    context = int(config.get("max_position_embeddings") or 2048)
    if kind == "yarn":
        rope.setdefault("original_max_position_embeddings", context)
    elif kind == "dynamic":
        rope["original_max_position_embeddings"] = context
    elif kind == "longrope":
        original = int(
            config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings", 0)
        )
        rope["original_max_position_embeddings"] = original or context
        rope["factor"] = rope.get("factor") or context / rope["original_max_position_embeddings"]
    return {"rope_type": kind, **rope}, theta


def _gguf_rope(get: Callable[..., Any]) -> dict[str, Any] | None:
    kind = get("rope.scaling.type", "none")
    if kind == "none":
        return None
    rope: dict[str, Any] = {"rope_type": kind, "factor": float(get("rope.scaling.factor", 1.0))}
    original = get("rope.scaling.original_context_length")
    if original:
        rope["original_max_position_embeddings"] = int(original)
    return rope


def _llama3_rope(factors: Sequence[float], theta: float, head_dim: int) -> dict[str, Any]:
    """The scaling that `factors` (what each frequency is divided by) were computed from. GGUF files of Llama 3 hold the
    factors only; all of that family share the other three numbers, and it is checked that they explain the factors."""
    scaling = {"factor": max(factors), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    original = 8192
    for i, found in enumerate(factors):
        turns = original / (2 * math.pi * theta ** (2 * i / head_dim))  # over the original context
        smooth = min(max((turns - 1.0) / 3.0, 0.0), 1.0)
        if not math.isclose(1 / ((1 - smooth) / scaling["factor"] + smooth), found, rel_tol=1e-3):
            raise ModelError("this GGUF file scales its rotary frequencies otherwise than Llama 3 does; not supported")
    return {"rope_type": "llama3", **scaling, "original_max_position_embeddings": original}


def _context(max_positions: int, rope: Config | None) -> int:
    """Tokens of context: linear and dynamic scaling and YaRN stretch what the model was first trained on."""
    if rope is None or rope["rope_type"] not in ("linear", "yarn", "dynamic"):
        return max_positions
    return int(rope.get("original_max_position_embeddings", max_positions) * float(rope.get("factor", 1.0)))


def _ids(*values: Any) -> tuple[int, ...]:
    """The distinct token ids in `values`, each None, a number or a list of numbers."""
    ids: list[int] = []
    for value in values:
        ids += [] if value is None else value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(ids))
