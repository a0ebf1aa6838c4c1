"""A checkpoint's tokenizer: text to token ids and back, and its chat template. Knows no HTTP and no model.

It comes from a Hugging Face folder or out of a GGUF file, through the `tokenizers` library alone; transformers is
imported only for a folder that holds no tokenizer.json (a SentencePiece model that must first be converted).
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from distserve.errors import ModelError, RequestError
from distserve.serve.http import gguf
from distserve.serve.http.template import ChatTemplate, Message

INLINE_CHARACTERS = 8192  # texts up to here (about 3 ms) are tokenized on the event loop, longer ones in a thread


class Tokenizer:
    """Text and token ids. Immutable once built; safe to use from several threads."""

    def __init__(
        self, backend: tokenizers.Tokenizer, template: str | None = None, special: Mapping[str, str] | None = None
    ) -> None:
        """`special`: the named special tokens (`bos_token`, ...). Raises `ModelError` for a kind of vocabulary whose
        tokens are no pieces of text."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special = dict(special or {})
        self.template = ChatTemplate(template, self.special) if template else None
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self.spelled = _spell(backend, {id: token.content for id, token in added.items()})
        """The bytes of each token, special ones spelled out."""
        self.vocab_size = len(self.spelled)
        self.pieces = [b"" if id in self.special_ids else piece for id, piece in enumerate(self.spelled)]
        """The bytes that each token adds to a text: none for special ones."""
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenize")

    @cached_property
    def longest_piece(self) -> int:
        """Bytes of the longest token: a text of n bytes has at least n / longest_piece tokens."""
        return max(map(len, self.spelled))

    @property
    def eos_id(self) -> int | None:
        return self._backend.token_to_id(self.special["eos_token"]) if "eos_token" in self.special else None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        # of the two, only encode_batch lets other threads run meanwhile; "fast": without character offsets
        return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    async def encode_async(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """`encode` without holding up the event loop, whatever the length."""
        if len(text) <= INLINE_CHARACTERS:
            return self.encode(text, add_special_tokens)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self.encode, text, add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token(self, id: int) -> str:
        """The vocabulary's own spelling of a token."""
        return self._backend.id_to_token(id) or ""

    def render(self, messages: Sequence[Message], **options: Any) -> str:
        """The prompt's text for a chat; options as for `ChatTemplate.render`."""
        if self.template is None:
            raise RequestError(
                "this model has no chat template: use /v1/completions, or serve a checkpoint that has one",
                param="messages",
            )
        return self.template.render(messages, **options)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint: a folder or a .gguf file. Raises `ModelError` with the cure."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one text at a time: a pool of threads would only cost
    path = Path(path)
    if path.is_dir():
        return _load_folder(path)
    if not path.exists():
        raise ModelError(f"there is no model at {path}: name a folder in Hugging Face layout or a .gguf file")
    metadata = gguf.read_metadata(path)
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(gguf.build_tokenizer(metadata), template, gguf.special_tokens(metadata))


def _load_folder(folder: Path) -> Tokenizer:
    config = _read_json(folder / "tokenizer_config.json")
    backend = _load_backend(folder)
    added = config.get("added_tokens_decoder", {})
    for entry in added.values():
        if backend.token_to_id(entry["content"]) is None:
            backend.add_tokens([tokenizers.AddedToken(**{k: v for k, v in entry.items() if k != "__type"})])
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
    values = {**_read_json(folder / "special_tokens_map.json"), **config}
    special = {name: _content(values[name]) for name in names if values.get(name)}
    return Tokenizer(backend, _find_template(folder, config), special)


def _load_backend(folder: Path) -> tokenizers.Tokenizer:
    file = folder / "tokenizer.json"
    if file.exists():
        try:
            return tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"{file} cannot be read ({error}): is the download complete?") from error
    if not any(folder.glob("*token*.model")) and not (folder / "vocab.json").exists():
        raise ModelError(
            f"{folder} holds no tokenizer: tokenizer.json (or tokenizer.model) must lie beside the weights"
        )
    os.environ.setdefault("USE_TORCH", "0")  # the gateway's memory: importing transformers must not bring torch along
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), use_fast=True).backend_tokenizer  # type: ignore[no-any-return]
    except Exception as error:  # whatever a converter meets in a damaged file, or a converter that is not installed
        raise ModelError(f"the tokenizer in {folder} cannot be converted ({error}): add its tokenizer.json") from error


def _find_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template: its own file, or inside the configuration; of several named ones the default."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = _read_json(folder / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default") or next(iter(named.values()), None)
    return template


def _read_json(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is not valid JSON ({error}): is the download complete?") from error
    return content if isinstance(content, dict) else {}


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _spell(backend: tokenizers.Tokenizer, added: Mapping[int, str]) -> list[bytes]:
    """The bytes of every token, by id. Added tokens stand for themselves."""
    decoder = _decoder_kinds(backend)
    if "ByteLevel" in decoder:
        alphabet = _byte_alphabet()

        def spell(token: str) -> bytes:
            try:
                return bytes([alphabet[character] for character in token])
            except KeyError:  # not written in the byte alphabet: it stands for itself (as in the library's decoder)
                return token.encode()

    elif decoder & {"ByteFallback", "Metaspace", "Replace"}:

        def spell(token: str) -> bytes:
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                return bytes.fromhex(token[3:5])
            return token.replace("▁", " ").encode()

    else:
        raise ModelError(
            f"a tokenizer that decodes by {sorted(decoder)} is not supported (byte-level or SentencePiece BPE are)"
        )
    vocabulary = backend.get_vocab(with_added_tokens=True)
    pieces = [b""] * (max(vocabulary.values()) + 1)
    for token, id in vocabulary.items():
        pieces[id] = spell(token)
    for id, content in added.items():
        if "ByteLevel" not in decoder:
            pieces[id] = content.encode()
    return pieces


def _decoder_kinds(backend: tokenizers.Tokenizer) -> set[str]:
    if backend.decoder is None:
        return set()
    state = json.loads(backend.decoder.__getstate__())
    return {part["type"] for part in (state, *state.get("decoders", ()))}


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's names for the 256 bytes: printable ones stand for themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
