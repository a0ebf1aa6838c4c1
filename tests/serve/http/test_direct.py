"""The short way to an answer says what the framework would say, also to what is no JSON, no object, or no body."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx2
import pytest
from tests.serve.http.fakes import FakeGenerator
from tests.serve.http.web import in_process, make_app

from distserve.serve.http.api import ApiOptions
from distserve.serve.http.tokens import Tokenizer

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
BODIES = [
    b"",
    b"null",
    b"[]",
    b"[1]",
    b'"text"',
    b"7",
    b"{",
    b'{"prompt": "x",}',
    b'{"prompt": NaN}',
    b'{"prompt": "x", "temperature": NaN}',
    b'{"prompt": "\xff"}',
    b"\xef\xbb\xbf{}",
    b'{"prompt": ' + b"[" * 100_000,
    b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}",
    b'{"prompt": "x", "max_tokens": 1.0}',
    b'{"prompt": "x", "max_tokens": "16"}',
    b'{"prompt": "x", "max_tokens": -1}',
    b'{"prompt": "x", "n": 0, "stop": [1]}',
    b'{"prompt": "x", "stop": {"a": 1}}',
    b'{"prompt": "x", "stream_options": {"include_usage": 1}}',
    b'{"prompt": "x", "logit_bias": {"5": "much"}}',
    b'{"prompt": "x", "model": 5}',
    b'{"prompt": "x", "model": "other"}',
    b'{"messages": []}',
    b'{"messages": [{"role": "nobody", "content": "x"}]}',
    b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
    b'{"messages": [{"role": "user", "content": 5}]}',
    b'{"messages": "hello"}',
]
KINDS = [
    "application/json",
    "Application/JSON; charset=utf-8",
    "application/problem+json",
    "application/jsonl",
    "text/plain",
    "application/x-www-form-urlencoded",
    "json",
    "",
    None,
]


@pytest.fixture
def generator(tokens: Tokenizer) -> FakeGenerator:
    return FakeGenerator(lambda request: [tokens.eos_id or 0])


@pytest.fixture
async def both(generator: FakeGenerator, tokens: Tokenizer) -> AsyncIterator[list[httpx2.AsyncClient]]:
    """The same application; behind a prefix the framework answers by itself."""
    app = make_app(generator, tokens, ApiOptions(("small",), max_body=600_000))
    prefixed = httpx2.AsyncClient(
        transport=httpx2.ASGITransport(app, root_path="/prefix"), base_url="http://test/prefix"
    )
    async with in_process(app) as direct, prefixed:
        yield [direct, prefixed]


async def told(clients: list[httpx2.AsyncClient], path: str, body: bytes, kind: str | None) -> list[tuple[int, object]]:
    headers = {} if kind is None else {"content-type": kind}
    answers = [await client.post(path, content=body, headers=headers) for client in clients]
    assert all(answer.headers["x-request-id"] for answer in answers)
    return [(answer.status_code, answer.json()) for answer in answers]


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("body", BODIES, ids=lambda body: repr(body[:40]))
async def test_bad_bodies(both: list[httpx2.AsyncClient], path: str, body: bytes) -> None:
    direct, framework = await told(both, path, body, "application/json")
    assert direct == framework
    assert 400 <= direct[0] < 500


@pytest.mark.parametrize("kind", KINDS)
async def test_content_types(both: list[httpx2.AsyncClient], generator: FakeGenerator, kind: str | None) -> None:
    direct, framework = await told(both, TEXT, b'{"prompt": "x", "temperature": -1}', kind)
    assert direct == framework


async def test_other_methods_are_the_frameworks(both: list[httpx2.AsyncClient]) -> None:
    for client in both:
        assert (await client.get(TEXT)).status_code == 405


async def test_a_body_without_a_length_is_stopped_when_it_grows_too_large(both: list[httpx2.AsyncClient]) -> None:
    async def large() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b" " * 100_000

    for client in both:
        answer = await client.post(TEXT, content=large(), headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["type"]) == (413, "invalid_request_error")


async def test_a_fault_of_ours_is_told_as_such_and_logged(
    both: list[httpx2.AsyncClient],
    generator: FakeGenerator,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> int:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(generator, "next_id", fail)
    answer = await both[0].post(TEXT, json={"prompt": "x"})
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "ZeroDivisionError" in caplog.text
