"""The tokenizer that a GGUF file's metadata describes; knows no tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from distserve.errors import ModelError
from distserve.gguf_head import read_head

_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6  # kinds of token in `tokenizer.ggml.token_type`

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS = "digits, then GPT-2's pattern"
_GPT2 = "GPT-2's pattern"
# How text is split before merging, by `tokenizer.ggml.pre`; the patterns are those of the models' own tokenizer.json.
PRE_TOKENIZERS = {
    "gpt-2": _GPT2,
    "olmo": _GPT2,
    "dbrx": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),
    "tekken": _TEKKEN,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": _DIGITS,
}


def read_metadata(path: Path) -> dict[str, Any]:
    """Every key of the file's head, the vocabulary included. Raises `ModelError`."""
    return read_head(path, arrays=True).metadata


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of `tokenizer.ggml.*`: byte-level BPE ("gpt2") or SentencePiece BPE ("llama").

    Raises `ModelError` for other kinds and for a pre-tokenizer that is not in `PRE_TOKENIZERS`: a wrong one would give
    wrong answers quietly.
    """
    kind = metadata.get("tokenizer.ggml.model")
    vocabulary = metadata.get("tokenizer.ggml.tokens")
    if not vocabulary:
        raise ModelError(
            "the GGUF file holds no tokenizer (tokenizer.ggml.tokens): convert the checkpoint with its tokenizer"
        )
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise ModelError(f"GGUF tokenizer kind {kind!r} is not supported (known: {', '.join(builders)})")
    tokenizer = builders[kind](metadata, vocabulary)
    kinds = metadata.get("tokenizer.ggml.token_type") or [1] * len(vocabulary)
    for wanted, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        found = (token for token, its in zip(vocabulary, kinds, strict=True) if its == wanted)
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in found])
    _frame(tokenizer, metadata, default=kind == "llama")
    return tokenizer


def special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The named special tokens, as chat templates know them."""
    vocabulary = metadata["tokenizer.ggml.tokens"]
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    return {name: vocabulary[id] for name, id in ids.items() if id is not None and 0 <= id < len(vocabulary)}


def _byte_level(metadata: Mapping[str, Any], vocabulary: Sequence[str]) -> Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre", "gpt-2")
    if pre not in PRE_TOKENIZERS:
        raise ModelError(f"GGUF pre-tokenizer {pre!r} is not supported (known: {', '.join(sorted(PRE_TOKENIZERS))})")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", ())]
    ids = {token: id for id, token in enumerate(vocabulary)}
    pattern = PRE_TOKENIZERS[pre]
    # llama.cpp takes a whole word that is in the vocabulary as it is exactly where Llama 3's tokenizer.json says so
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=pattern is _LLAMA3 or pattern is _TEKKEN))
    if pattern is _GPT2:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif pattern is _DIGITS:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: Mapping[str, Any], vocabulary: Sequence[str]) -> Tokenizer:
    """GGUF keeps SentencePiece's scores but no merges: every way to put a piece together out of two others is a merge,
    tried in the order of the pieces' scores (as transformers converts these tokenizers)."""
    ids = {token: id for id, token in enumerate(vocabulary)}
    scores = metadata.get("tokenizer.ggml.scores") or [0.0] * len(vocabulary)
    merges: list[tuple[float, int, int, tuple[str, str]]] = []
    for id, token in enumerate(vocabulary):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                merges.append((-scores[id], ids[left], ids[right], (left, right)))
    merges.sort(key=lambda merge: merge[:3])
    unknown = vocabulary[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=ids, merges=[pair for *_, pair in merges], unk_token=unknown, fuse_unk=True, byte_fallback=True
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps: list[normalizers.Normalizer] = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    ends: list[decoders.Decoder] = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
    return tokenizer


def _frame(tokenizer: Tokenizer, metadata: Mapping[str, Any], default: bool) -> None:
    """Puts begin and end tokens around encoded text where the file asks for them (SentencePiece: begin by default)."""
    names = special_tokens(metadata)
    bos, eos = names.get("bos_token"), names.get("eos_token")
    begin = [bos] if bos and metadata.get("tokenizer.ggml.add_bos_token", default) else []
    end = [eos] if eos and metadata.get("tokenizer.ggml.add_eos_token", False) else []
    if begin or end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*begin, "$A", *end],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*begin, *end}],
        )
