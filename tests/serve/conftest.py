"""The small tokenizer, made once for all tests of the HTTP side."""

from __future__ import annotations

import pytest

from distserve.serve.tokens import Tokenizer
from tests.serve.small import make_tokenizer


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
