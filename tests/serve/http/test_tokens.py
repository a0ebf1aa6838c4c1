"""Tokenizers as checkpoints have them, folder and GGUF, compared with what transformers makes of the same files."""

from __future__ import annotations

import asyncio
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tests.serve.http.small import SPECIAL, TEXT, make_folder
from tokenizers import decoders, models, normalizers

from distserve.errors import ModelError, RequestError
from distserve.request import FinishReason, Token
from distserve.serve.http import gguf
from distserve.serve.http.text import TextStream
from distserve.serve.http.tokens import INLINE_CHARACTERS, Tokenizer, load_tokenizer

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
DEMO = CACHE / "distserve" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  What is 2+2?\n"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "Größer 😀?"},
]
VARIED = [
    *TEXT,
    "",
    " ",
    "\n\n\n   leading and trailing   ",
    "1234567890 3.14159 1,000,000 ½ ²",
    "日本語のテキスト 中文 한국어 عربى עברית हिन्दी",
    "👩‍👩‍👧‍👦 emoji 🏳️‍🌈 \u200b zero width",
    "I'm you're they'll WE'VE <|im_start|>user<|im_end|> <|endoftext|>",
    'for (int i = 0; i < 10; i++) { printf("%d\\n", i); }\t\ttabs\r\nwindows',
]


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    if not DEMO.exists():
        pytest.skip(f"the demo model is not at {DEMO}: `make demo` fetches it")
    return load_tokenizer(DEMO)


@given(st.text(max_size=80))
def test_any_text_survives_the_way_through_tokens(tokens: Tokenizer, text: str) -> None:
    ids = tokens.encode(text)
    assert b"".join(tokens.spelled[id] for id in ids) == text.encode()
    assert tokens.decode(ids) == text


@given(st.lists(st.integers(0, 511), max_size=30), st.booleans())
def test_streamed_text_is_the_decoded_text(tokens: Tokenizer, ids: list[int], skip: bool) -> None:
    ids = [id % tokens.vocab_size for id in ids] or [5]
    stream = TextStream(tokens.pieces if skip else tokens.spelled)
    parts = [stream.feed([Token(id)]) for id in ids[:-1]]
    parts.append(stream.feed([Token(ids[-1], FinishReason.LENGTH)]))
    assert "".join(parts) == tokens.decode(ids, skip_special_tokens=skip)


def test_special_tokens_are_tokens_in_a_prompt_and_no_text_in_an_answer(tokens: Tokenizer) -> None:
    ids = tokens.encode("<|im_start|>user")
    assert ids[0] == SPECIAL.index("<|im_start|>")
    assert tokens.decode(ids, skip_special_tokens=True) == "user"
    assert tokens.decode(ids) == "<|im_start|>user"
    assert tokens.pieces[ids[0]] == b""
    assert tokens.eos_id == SPECIAL.index("<|im_end|>")


async def test_a_long_prompt_is_tokenized_beside_the_event_loop(tokens: Tokenizer) -> None:
    text = (" ".join(TEXT) + "\n") * (200_000 // len(" ".join(TEXT)))
    assert len(text) > INLINE_CHARACTERS
    beats = 0

    async def beat() -> None:
        nonlocal beats
        while True:
            await asyncio.sleep(0.001)
            beats += 1

    beating = asyncio.create_task(beat())
    ids = await tokens.encode_async(text)
    beating.cancel()
    assert ids == tokens.encode(text)
    assert beats >= 5, "the loop stood still while tokenizing"


def test_a_folder_gives_the_ids_and_chats_that_transformers_gives(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = make_folder(tmp_path / "model")
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(str(folder))
    for text in VARIED:
        assert ours.encode(text) == theirs.encode(text)
    assert ours.render(CHAT) == theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert ours.special.items() >= {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}.items()


def test_the_demo_models_ids_and_chats_are_those_of_transformers(demo: Tokenizer) -> None:
    # what AutoTokenizer.from_pretrained(gguf_file=...) does, which takes 20 s for all that is around it
    from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer, get_gguf_tokenizer
    from transformers.utils.chat_template_utils import render_jinja_template

    architecture, described, config = get_gguf_tokenizer(str(DEMO))
    theirs, _ = convert_gguf_tokenizer(architecture, described)
    # transformers has no "smollm" pre-tokenizer: the published tokenizer of this model separates digits first
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, byte_level])
    for text in VARIED:
        assert demo.encode(text) == theirs.encode(text).ids, text
        assert demo.decode(demo.encode(text)) == text
    rendered, _ = render_jinja_template([CHAT], chat_template=config["chat_template"], add_generation_prompt=True)
    assert demo.render(CHAT) == rendered[0]
    assert demo.render(CHAT[1:2]).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")


def test_the_demo_models_tokenizer_loads_quickly_small_and_without_torch(demo: Tokenizer) -> None:
    script = (
        "import sys, time; begun = time.process_time()\n"
        "from distserve.serve.http.tokens import load_tokenizer\n"
        "import distserve.serve.http.api\n"
        f"load_tokenizer({str(DEMO)!r})\n"
        "resident = next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1]\n"
        "print(time.process_time() - begun, int(resident) * 1024)\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    measured, heavy = run.stdout.splitlines()
    seconds, resident = map(float, measured.split())
    assert heavy == "[]"
    assert resident < 150e6
    assert seconds < 4, "2 s are the aim, on a quiet machine"


# -- GGUF ------------------------------------------------------------------------------------------------------------


def write_gguf(path: Path, metadata: dict[str, Any]) -> Path:
    """A GGUF file of metadata alone."""

    def string(text: str) -> bytes:
        return struct.pack("<Q", len(text.encode())) + text.encode()

    def value(item: Any) -> bytes:
        if isinstance(item, bool):
            return struct.pack("<I?", 7, item)
        if isinstance(item, int):
            return struct.pack("<II", 4, item)
        if isinstance(item, str):
            return struct.pack("<I", 8) + string(item)
        kind, pack = {str: (8, string), int: (5, struct.Struct("<i").pack), float: (6, struct.Struct("<f").pack)}[
            type(item[0])
        ]
        return struct.pack("<IIQ", 9, kind, len(item)) + b"".join(map(pack, item))

    body = b"".join(string(key) + value(item) for key, item in metadata.items())
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(metadata)) + body)
    return path


def byte_level_metadata(folder: Path, **more: Any) -> dict[str, Any]:
    """The small tokenizer as GGUF says it."""
    model = json.loads((make_folder(folder) / "tokenizer.json").read_text())["model"]
    vocabulary = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in vocabulary],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0]['content'] }}",
        **more,
    }


def test_a_gguf_file_gives_the_same_tokenizer_as_the_folder_it_came_from(tmp_path: Path) -> None:
    ours = load_tokenizer(write_gguf(tmp_path / "m.gguf", byte_level_metadata(tmp_path / "model")))
    folder = load_tokenizer(tmp_path / "model")
    for text in VARIED:
        assert ours.encode(text) == folder.encode(text)
    assert ours.pieces == folder.pieces
    assert ours.eos_id == folder.eos_id
    assert ours.render([{"role": "user", "content": "hi"}]) == "<|im_start|>hi"


@pytest.mark.parametrize("pre", sorted(gguf.PRE_TOKENIZERS))
def test_every_known_pre_tokenizer_keeps_all_bytes(tmp_path: Path, pre: str) -> None:
    metadata = byte_level_metadata(tmp_path / "model", **{"tokenizer.ggml.pre": pre})
    ours = load_tokenizer(write_gguf(tmp_path / "m.gguf", metadata))
    for text in TEXT:
        assert ours.decode(ours.encode(text)) == text


def test_begin_and_end_tokens_are_added_where_the_file_asks(tmp_path: Path) -> None:
    flags = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    ours = load_tokenizer(write_gguf(tmp_path / "m.gguf", byte_level_metadata(tmp_path / "model", **flags)))
    bare = ours.encode("hello", add_special_tokens=False)
    assert ours.encode("hello") == [1, *bare, 2]


def test_sentencepiece_vocabulary_merges_by_score_and_falls_back_to_bytes(tmp_path: Path) -> None:
    letters = sorted(set("▁helowrd"))
    words = ["he", "ll", "hell", "hello", "▁hello", "wo", "▁wo", "rld", "ld", "▁world", "▁wor"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *words]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (len(letters) + len(words))]
    scores = [*[0.0] * (259 + len(letters)), *(-float(i + 1) for i in range(len(words)))]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    ours = load_tokenizer(write_gguf(tmp_path / "m.gguf", metadata))
    ids = ours.encode("hello world é")
    assert [ours.token(id) for id in ids] == ["<s>", "▁hello", "▁world", "▁", "<0xC3>", "<0xA9>"]
    assert ours.decode(ids, skip_special_tokens=True) == "hello world é"
    stream = TextStream(ours.pieces)
    parts = [stream.feed([Token(id)]) for id in ids]
    assert parts == ["", " hello", " world", " ", "", "é"], "a continuation keeps its leading space"


def test_damaged_and_unknown_gguf_files_say_what_is_wrong(tmp_path: Path) -> None:
    good = byte_level_metadata(tmp_path / "model")
    file = write_gguf(tmp_path / "m.gguf", good)
    whole = file.read_bytes()
    cases: list[tuple[bytes, str]] = [
        (b"PK\x03\x04" + whole[4:], "not a GGUF file"),
        (whole[: len(whole) // 2], "fetch it again"),
        (b"GGUF" + struct.pack("<I", 9) + whole[8:], "version 9"),
        (whole[:16] + struct.pack("<Q", 1 << 60) + whole[24:], "fetch it again"),
    ]
    for content, said in cases:
        file.write_bytes(content)
        with pytest.raises(ModelError, match=said):
            load_tokenizer(file)
    for key, value, said in [
        ("tokenizer.ggml.pre", "martian", "pre-tokenizer 'martian' is not supported"),
        ("tokenizer.ggml.model", "bert", "kind 'bert' is not supported"),
    ]:
        with pytest.raises(ModelError, match=said):
            load_tokenizer(write_gguf(tmp_path / "m.gguf", {**good, key: value}))
    del good["tokenizer.ggml.tokens"]
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_tokenizer(write_gguf(tmp_path / "m.gguf", good))


# -- folders ---------------------------------------------------------------------------------------------------------


def test_folders_without_a_tokenizer_and_damaged_ones_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no model at"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    folder = make_folder(tmp_path / "model")
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").unlink()
    content = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(content[:-100])
    with pytest.raises(ModelError, match="cannot be read"):
        load_tokenizer(folder)


def test_a_vocabulary_that_is_not_made_of_bytes_or_pieces_is_refused() -> None:
    backend = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ModelError, match="WordPiece"):
        Tokenizer(backend)


def test_truncation_and_padding_of_the_file_are_not_obeyed(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    assert len(Tokenizer(backend).encode("hello world, hello world")) > 4


def test_a_metaspace_decoder_spells_spaces() -> None:
    backend = tokenizers.Tokenizer(models.BPE({"▁a": 0, "b": 1}, []))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Metaspace()
    assert Tokenizer(backend).pieces == [b" a", b"b"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"chat_template": "one"}, "one"),
        ({"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}, "d"),
        ({"chat_template": [{"name": "rag", "template": "r"}]}, "r"),
        ({"bos_token": {"content": "<|im_start|>"}}, None),
    ],
)
def test_the_chat_template_is_found_in_the_configuration(
    tmp_path: Path, config: dict[str, Any], expected: str | None
) -> None:
    folder = make_folder(tmp_path, template=None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load_tokenizer(folder)
    assert (ours.template.source if ours.template else None) == expected
    if expected is None:
        assert ours.special == {"bos_token": "<|im_start|>"}
        with pytest.raises(RequestError, match="no chat template") as caught:
            ours.render(CHAT)
        assert caught.value.param == "messages"
