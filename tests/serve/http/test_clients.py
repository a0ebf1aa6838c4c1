"""The real `openai` client, and a client that hangs up, against a real server on a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from tests.serve.http.fakes import FakeGenerator
from tests.serve.http.web import listening, make_app

from distserve.errors import InstanceError, OverloadedError
from distserve.request import FinishReason
from distserve.serve.http.api import ApiOptions
from distserve.serve.http.tokens import Tokenizer

ANSWER = "The quick brown fox jumps over the lazy dog. 😀 Größe"
USER: Any = [{"role": "user", "content": "hello"}]
SOON = 1.0  # seconds within which a client's leaving must have freed everything


@pytest.fixture
def generator(tokens: Tokenizer) -> FakeGenerator:
    ids = [*tokens.encode(ANSWER), tokens.eos_id or 0]
    return FakeGenerator(lambda request: ids)


@pytest.fixture
async def url(generator: FakeGenerator, tokens: Tokenizer) -> AsyncIterator[str]:
    async with listening(make_app(generator, tokens, ApiOptions(("small",), api_keys=("key",)))) as url:
        yield url


@pytest.fixture
async def client(url: str) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0) as client:
        yield client


# -- the openai client -----------------------------------------------------------------------------------------------


async def test_chat(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="small", messages=USER)
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer._request_id
    assert answer.id.endswith(answer._request_id)


async def test_streamed_chat(client: AsyncOpenAI) -> None:
    options: Any = {"include_usage": True}
    text, usages, reasons = "", [], []
    async with await client.chat.completions.create(
        model="small", messages=USER, stream=True, stream_options=options
    ) as stream:
        async for chunk in stream:
            usages.append(chunk.usage)
            for choice in chunk.choices:
                text += choice.delta.content or ""
                reasons.append(choice.finish_reason)
    assert text == ANSWER
    assert reasons[-1] == "stop"
    assert usages[-1] is not None
    assert set(usages[:-1]) == {None}


async def test_the_stream_helper_rebuilds_the_message(client: AsyncOpenAI) -> None:
    async with client.chat.completions.stream(model="small", messages=USER, n=2) as stream:
        async for _ in stream:
            pass
        whole = await stream.get_final_completion()
    assert [choice.message.content for choice in whole.choices] == [ANSWER, ANSWER]
    assert {choice.message.role for choice in whole.choices} == {"assistant"}


async def test_every_parameter_of_the_client_is_taken(client: AsyncOpenAI, generator: FakeGenerator) -> None:
    answer = await client.chat.completions.create(
        model="small",
        messages=[
            {"role": "system", "content": "Be brief.", "name": "boss"},
            {"role": "user", "content": [{"type": "text", "text": "hello"}]},
        ],
        max_completion_tokens=4,
        temperature=0.3,
        top_p=0.8,
        n=2,
        seed=5,
        stop=["###"],
        logprobs=True,
        top_logprobs=2,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        logit_bias={"7": -1},
        user="me",
        metadata={"a": "b"},
        store=False,
        parallel_tool_calls=False,
        response_format={"type": "text"},
        tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
        tool_choice="auto",
        extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "ignore_eos": True, "min_tokens": 2},
        extra_headers={"x-request-id": "mine"},
    )
    assert answer.id == "chatcmpl-mine"
    assert len(answer.choices) == 2
    assert answer.choices[0].finish_reason == "length"
    content: Any = answer.choices[0].logprobs and answer.choices[0].logprobs.content
    assert content is not None
    assert [len(entry.top_logprobs) for entry in content] == [2] * 4
    sampling = generator.requests[0].sampling
    assert (sampling.max_tokens, sampling.top_k, sampling.min_tokens) == (4, 5, 2)
    assert (sampling.temperature, sampling.logit_bias) == (0.3, ((7, -1.0),))


async def test_completions(client: AsyncOpenAI, generator: FakeGenerator) -> None:
    answer = await client.completions.create(model="small", prompt=["a", "b"], max_tokens=100, echo=True, logprobs=1)
    assert [choice.text for choice in answer.choices] == ["a" + ANSWER, "b" + ANSWER]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.text_offset is not None
    assert len(logprobs.token_logprobs) == len(logprobs.text_offset)
    text = ""
    async for chunk in await client.completions.create(model="small", prompt=[5, 6], max_tokens=100, stream=True):
        text += chunk.choices[0].text
    assert text == ANSWER
    assert generator.requests[-1].prompt == [5, 6]


async def test_models(client: AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["small"]
    assert (await client.models.retrieve("small")).object == "model"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("other")


async def test_errors_become_the_clients_own(client: AsyncOpenAI, url: str, generator: FakeGenerator) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        await client.chat.completions.create(model="small", messages=USER, temperature=-1)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="gpt-5", messages=USER)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        await client.with_options(api_key="wrong").models.list()
    generator.error = OverloadedError("full", retry_after=0.05)
    with pytest.raises(openai.RateLimitError) as full:
        await client.chat.completions.create(model="small", messages=USER, stream=True)
    assert full.value.response.headers["retry-after-ms"] == "50"
    generator.error = InstanceError("decode-0 died")
    with pytest.raises(openai.InternalServerError):
        await client.chat.completions.create(model="small", messages=USER)


async def test_the_client_waits_as_told_and_tries_again(client: AsyncOpenAI, generator: FakeGenerator) -> None:
    generator.error = OverloadedError("full", retry_after=0.05)

    async def recover() -> None:
        while not generator.requests:  # noqa: ASYNC110  the fake has no event for it
            await asyncio.sleep(0.001)
        generator.error = None

    recovering = asyncio.create_task(recover())
    answer = await client.with_options(max_retries=1).chat.completions.create(model="small", messages=USER)
    await recovering
    assert answer.choices[0].message.content == ANSWER
    assert len(generator.requests) == 2


async def test_an_error_in_the_middle_of_a_stream_reaches_the_client(
    client: AsyncOpenAI, generator: FakeGenerator
) -> None:
    generator.error, generator.error_at = InstanceError("decode-0 died"), 4
    stream = aiter(await client.chat.completions.create(model="small", messages=USER, stream=True))
    text = "".join([(await anext(stream)).choices[0].delta.content or "" for _ in range(4)])
    assert ANSWER.startswith(text)
    with pytest.raises(openai.APIError, match="decode-0 died"):
        await anext(stream)


async def test_text_appears_while_the_answer_is_being_generated(client: AsyncOpenAI, generator: FakeGenerator) -> None:
    generator.pause_at = 3
    stream = await client.chat.completions.create(model="small", messages=USER, stream=True)
    first = await anext(aiter(stream))
    assert first.choices[0].delta.role == "assistant"
    assert first.choices[0].delta.content == "The"
    assert generator.open == 1
    generator.go.set()
    rest = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "The" + "".join(rest) == ANSWER


async def test_many_streams_at_once(client: AsyncOpenAI, generator: FakeGenerator) -> None:
    async def one() -> str:
        stream = await client.chat.completions.create(model="small", messages=USER, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert set(await asyncio.gather(*(one() for _ in range(30)))) == {ANSWER}
    assert generator.open == 0


# -- clients that go away --------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def post(url: str, body: dict[str, Any]) -> AsyncIterator[asyncio.StreamReader]:
    """Sends a request over a socket of its own, reads nothing yet, and hangs up at the end."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
    client.setblocking(False)
    await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", int(url.rpartition(":")[2])))
    reader, writer = await asyncio.open_connection(sock=client)
    content = json.dumps(body).encode()
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer key\r\ncontent-type: application/json\r\n"
    writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
    await writer.drain()
    try:
        yield reader
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def until_open(generator: FakeGenerator, count: int) -> None:
    async with asyncio.timeout(5):
        while generator.open < count:  # noqa: ASYNC110  as above
            await asyncio.sleep(0.001)


async def test_a_stream_that_is_left_is_closed_at_once(client: AsyncOpenAI, generator: FakeGenerator) -> None:
    generator.pause_at = 2
    stream = await client.chat.completions.create(model="small", messages=USER, stream=True)
    await anext(aiter(stream))
    assert generator.open == 1
    await stream.close()
    async with asyncio.timeout(SOON):
        await generator.closed.wait()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_hangs_up_before_the_first_token_frees_everything(
    url: str, generator: FakeGenerator, stream: bool, n: int
) -> None:
    generator.pause_at = 0
    async with post(url, {"messages": USER, "stream": stream, "n": n}):
        await until_open(generator, n)
    async with asyncio.timeout(SOON):
        await generator.closed.wait()
    assert generator.num_yielded == 0


async def test_a_client_that_hangs_up_while_tokens_flow_frees_everything(
    url: str, generator: FakeGenerator, tokens: Tokenizer
) -> None:
    ids = tokens.encode(ANSWER) * 100_000
    generator.script, generator.finish = lambda request: ids, FinishReason.LENGTH
    async with post(url, {"messages": USER, "stream": True}) as reader:
        await reader.read(2000)
    async with asyncio.timeout(SOON):
        await generator.closed.wait()
    assert generator.num_yielded < len(ids)


async def test_a_client_that_reads_slowly_holds_its_stream_back(url: str, generator: FakeGenerator) -> None:
    """The socket's buffers fill, and no more is taken from the generator: memory stays bounded."""
    count = 200_000  # of 500 bytes each
    generator.script, generator.max_model_len = lambda request: [5] * count, 2 * count
    async with post(url, {"prompt": [5], "stream": True, "max_tokens": count, "logprobs": 20}):
        await until_open(generator, 1)
        before = -1
        async with asyncio.timeout(30):
            while generator.num_yielded != before:
                before = generator.num_yielded
                await asyncio.sleep(0.2)
        assert 0 < generator.num_yielded < count / 2
    async with asyncio.timeout(SOON):
        await generator.closed.wait()


async def test_a_connection_serves_one_request_after_another(url: str, generator: FakeGenerator) -> None:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0) as client:
        for _ in range(3):
            stream = await client.chat.completions.create(model="small", messages=USER, stream=True)
            assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == ANSWER
            answer = await client.chat.completions.create(model="small", messages=USER)
            assert answer.choices[0].message.content == ANSWER
    assert generator.open == 0
