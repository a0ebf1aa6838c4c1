"""A folder of each family served as a user serves it: prompts computed in one process, tokens in another."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.engine.support import reference_tokens
from tests.engine.test_models import checkpoint
from tests.serve.http.small import make_tokenizer
from tests.serve.live import serving


@pytest.mark.parametrize("case", ["qwen2", "qwen3", "opt", "gpt2"])
def test_a_folder_is_served(case: str, tmp_path: Path) -> None:
    folder = tmp_path / case
    tokenizer = make_tokenizer(folder)
    reference = checkpoint(folder, case, vocab_size=tokenizer.vocab_size)
    text = "The quick brown fox jumps over the lazy dog."
    expected = reference_tokens(reference, tokenizer.encode(text), 60)
    with serving(tmp_path, str(folder), "--kv-memory", "8MiB") as server:
        answer = server.text(text, max_tokens=60, ignore_eos=True)
        assert server.total("distserve:pull_bytes_total") > 0
    assert answer == b"".join(tokenizer.pieces[token] for token in expected).decode(errors="replace")
