"""The small tokenizer, made once for all tests of the HTTP side."""

from __future__ import annotations

import pytest
from tests.serve.http.small import make_tokenizer

from distserve.serve.http.tokens import Tokenizer


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
