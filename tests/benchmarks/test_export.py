"""The checkpoint that peers serve is the one that we serve: exported without our reader, read back with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmarks.export_demo import export, hf_name
from transformers import AutoTokenizer

from distserve.engine import hub
from distserve.engine.models.base import build
from distserve.engine.weights import load
from distserve.serve.http.tokens import load_tokenizer


def test_names() -> None:
    assert hf_name("token_embd.weight") == "model.embed_tokens.weight"
    assert hf_name("blk.7.attn_q.weight") == "model.layers.7.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    export(hub.resolve("demo"), out, "bfloat16")
    return out


def test_the_exported_folder_is_the_same_model(folder: Path) -> None:
    file = hub.resolve("demo")
    ours, theirs = hub.read_spec(file), hub.read_spec(folder)
    assert theirs == ours
    weights = []
    for path in (file, folder):
        model = build(ours, torch.bfloat16)
        load(path, model, torch.device("cpu"), lambda fraction: None)
        weights.append(dict(model.named_parameters()))
    assert weights[0].keys() == weights[1].keys()
    differing = [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])]
    assert not differing


def test_the_exported_tokenizer_agrees_with_ours(folder: Path) -> None:
    ours, theirs = load_tokenizer(hub.resolve("demo")), AutoTokenizer.from_pretrained(folder)
    for text in (
        "Hello, world",
        "  indented\n\tcode = 12345",
        "naïve café — 日本語 🙂",
        "<|im_start|>user\nhi<|im_end|>",
    ):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
