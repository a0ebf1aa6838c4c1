"""Every route, every field, every refusal: bodies in, bodies out, no socket."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from tests.serve.http.fakes import FakeGenerator
from tests.serve.http.web import in_process, make_app

from distserve.errors import InstanceError, InstanceGone, OverloadedError, RequestError, UnavailableError
from distserve.request import FinishReason, SamplingParams
from distserve.serve.http.api import ApiOptions
from distserve.serve.http.tokens import Tokenizer

ANSWER = "The quick brown fox jumps over the lazy dog."
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
JSON = {"content-type": "application/json"}
USER = [{"role": "user", "content": "hello"}]


@pytest.fixture
def generator(tokens: Tokenizer) -> FakeGenerator:
    """Says ANSWER, then ends."""
    ids = [*tokens.encode(ANSWER), tokens.eos_id or 0]
    return FakeGenerator(lambda request: ids)


@pytest.fixture
async def client(generator: FakeGenerator, tokens: Tokenizer) -> AsyncIterator[httpx2.AsyncClient]:
    async with in_process(make_app(generator, tokens)) as client:
        yield client


async def chat(client: httpx2.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post(CHAT, json={"messages": USER, **fields})
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


async def complete(client: httpx2.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post(TEXT, json={"prompt": "hello", "max_tokens": 100, **fields})
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


async def refused(client: httpx2.AsyncClient, path: str, body: Any, status: int = 400) -> dict[str, Any]:
    response = await client.post(path, json=body)
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    return error


def events(text: str) -> list[Any]:
    """The contents of a stream's events; the last must be [DONE]."""
    lines = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


# -- answers ---------------------------------------------------------------------------------------------------------


async def test_a_chat_is_answered(client: httpx2.AsyncClient, generator: FakeGenerator, tokens: Tokenizer) -> None:
    answer = await chat(client)
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": ANSWER, "refusal": None}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    assert (answer["object"], answer["model"]) == ("chat.completion", "small")
    prompt = tokens.encode("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")
    assert generator.requests[0].prompt == prompt
    generated = len(tokens.encode(ANSWER)) + 1
    expected = {"prompt_tokens": len(prompt), "completion_tokens": generated}
    assert answer["usage"] == {**expected, "total_tokens": len(prompt) + generated}


async def test_the_first_chunk_brings_role_and_text_and_the_last_the_reason(client: httpx2.AsyncClient) -> None:
    response = await client.post(CHAT, json={"messages": USER, "stream": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    chunks = events(response.text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    assert deltas[0]["content"]
    assert all("role" not in delta for delta in deltas[1:])
    assert "".join(delta["content"] for delta in deltas) == ANSWER
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert all("usage" not in chunk for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1


async def test_usage_comes_in_a_last_chunk_without_choices(client: httpx2.AsyncClient) -> None:
    body = {"messages": USER, "stream": True, "stream_options": {"include_usage": True}}
    chunks = events((await client.post(CHAT, json=body)).text)
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == (await chat(client))["usage"]


async def test_continuous_usage_counts_up(client: httpx2.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": "hello", "max_tokens": 100, "stream": True, "stream_options": options}
    chunks = events((await client.post(TEXT, json=body)).text)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts[:-1] == list(range(1, len(chunks)))
    assert counts[-1] == counts[-2]


async def test_tokens_that_arrive_together_go_out_together(tokens: Tokenizer) -> None:
    generator = FakeGenerator(lambda request: tokens.encode(ANSWER), portion=5, finish=FinishReason.LENGTH)
    async with in_process(make_app(generator, tokens)) as client:
        chunks = events((await client.post(CHAT, json={"messages": USER, "stream": True})).text)
    assert len(chunks) == -(-len(tokens.encode(ANSWER)) // 5)
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == ANSWER


@pytest.mark.parametrize("portion", [1, 3])
async def test_characters_of_several_tokens_are_never_split(tokens: Tokenizer, portion: int) -> None:
    text = "a 😀 ü 日本 👩‍👩‍👧‍👦 end"
    generator = FakeGenerator(lambda request: tokens.encode(text), portion=portion, finish=FinishReason.LENGTH)
    async with in_process(make_app(generator, tokens)) as client:
        chunks = events((await client.post(CHAT, json={"messages": USER, "stream": True})).text)
    parts = [chunk["choices"][0]["delta"]["content"] for chunk in chunks]
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)


async def test_n_choices_are_n_requests_with_seeds_of_their_own(
    client: httpx2.AsyncClient, generator: FakeGenerator
) -> None:
    answer = await chat(client, n=3, seed=7)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [request.sampling.seed for request in generator.requests] == [7, 8, 9]
    assert len({request.id for request in generator.requests}) == 3
    one = (await chat(client))["usage"]
    assert answer["usage"]["completion_tokens"] == 3 * one["completion_tokens"]
    assert answer["usage"]["prompt_tokens"] == one["prompt_tokens"]


async def test_n_choices_share_a_stream(client: httpx2.AsyncClient) -> None:
    body = {"messages": USER, "stream": True, "n": 3, "stream_options": {"include_usage": True}}
    chunks = events((await client.post(CHAT, json=body)).text)
    texts = {0: "", 1: "", 2: ""}
    roles, reasons = 0, []
    for chunk in chunks[:-1]:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"]["content"]
        roles += "role" in choice["delta"]
        reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
    assert set(texts.values()) == {ANSWER}
    assert (roles, reasons) == (3, ["stop"] * 3)
    assert chunks[-1]["usage"]["completion_tokens"] > 0


async def test_without_a_seed_choices_differ(client: httpx2.AsyncClient, generator: FakeGenerator) -> None:
    await chat(client, n=4)
    assert len({request.sampling.seed for request in generator.requests}) == 4


@pytest.mark.parametrize(
    "prompt",
    ["hello", ["hello", "world"], [300, 301, 302], [[300, 301], [302]]],
    ids=["string", "strings", "ids", "lists of ids"],
)
async def test_every_form_of_prompt(
    client: httpx2.AsyncClient, generator: FakeGenerator, tokens: Tokenizer, prompt: Any
) -> None:
    answer = await complete(client, prompt=prompt, n=2)
    several = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    expected = [tokens.encode(one) if isinstance(one, str) else one for one in several]
    sent = [request.prompt for request in sorted(generator.requests, key=lambda request: request.id)]
    assert sent == [ids for ids in expected for _ in range(2)]
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * len(expected)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))
    assert answer["object"] == "text_completion"


async def test_stop_strings_end_the_request_and_free_it(
    client: httpx2.AsyncClient, generator: FakeGenerator, tokens: Tokenizer
) -> None:
    answer = await chat(client, stop=["umps ov", "never"])
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == ANSWER[: ANSWER.index("umps ov")]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "umps ov")
    await generator.closed.wait()
    assert generator.finishes[0] is FinishReason.STOP
    assert generator.num_yielded < len(tokens.encode(ANSWER))
    assert answer["usage"]["completion_tokens"] == generator.num_yielded
    included = await chat(client, stop="fox", include_stop_str_in_output=True)
    assert included["choices"][0]["message"]["content"] == "The quick brown fox"


async def test_a_stop_string_is_never_streamed(client: httpx2.AsyncClient) -> None:
    body = {"prompt": "x", "max_tokens": 100, "stream": True, "stop": "jumps"}
    chunks = events((await client.post(TEXT, json=body)).text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "The quick brown fox "
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


async def test_special_tokens_can_be_kept(client: httpx2.AsyncClient, generator: FakeGenerator) -> None:
    generator.finish = FinishReason.LENGTH
    assert (await complete(client, skip_special_tokens=False))["choices"][0]["text"] == ANSWER + "<|im_end|>"
    assert (await complete(client))["choices"][0]["text"] == ANSWER


async def test_all_sampling_fields_arrive(client: httpx2.AsyncClient, generator: FakeGenerator) -> None:
    fields: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "presence_penalty": 0.1,
        "frequency_penalty": -0.2,
        "repetition_penalty": 1.1,
        "seed": 11,
        "min_tokens": 3,
        "ignore_eos": True,
    }
    more = {"max_tokens": 50, "logit_bias": {"5": -100, "7": 1.5}, "stop_token_ids": [9, 10]}
    await chat(client, **fields, **more)
    expected = SamplingParams(**fields, max_tokens=50, logit_bias=((5, -100.0), (7, 1.5)), stop_token_ids=(9, 10))
    assert generator.requests[0].sampling == expected


async def test_defaults_are_openais_and_null_means_left_out(
    client: httpx2.AsyncClient, generator: FakeGenerator
) -> None:
    names = (
        "model stream stream_options n temperature top_p top_k min_p stop stop_token_ids logprobs max_tokens "
        "presence_penalty frequency_penalty repetition_penalty logit_bias min_tokens ignore_eos user "
        "response_format best_of skip_special_tokens include_stop_str_in_output"
    )
    nothing: dict[str, Any] = dict.fromkeys(names.split())
    await chat(client, **nothing, tools=None, tool_choice=None, max_completion_tokens=None, top_logprobs=None, seed=1)
    await complete(client, **nothing, echo=None, suffix=None, seed=1)
    chatted, completed = (request.sampling for request in generator.requests)
    assert chatted == SamplingParams(max_tokens=8192 - len(generator.requests[0].prompt), seed=1)
    assert completed == SamplingParams(max_tokens=16, seed=1)


async def test_the_checkpoints_sampling_defaults_stand_where_the_request_says_nothing(
    generator: FakeGenerator, tokens: Tokenizer
) -> None:
    options = ApiOptions(("m",), sampling_defaults={"temperature": 0.6, "top_k": 20})
    async with in_process(make_app(generator, tokens, options)) as client:
        await chat(client, top_k=5)
    sampling = generator.requests[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.6, 5, 1.0)


async def test_unknown_fields_are_accepted(client: httpx2.AsyncClient) -> None:
    await chat(client, user="me", store=True, metadata={"a": 1}, service_tier="auto", whatever=[1, {"x": None}])


async def test_max_completion_tokens_wins_over_max_tokens(client: httpx2.AsyncClient, generator: FakeGenerator) -> None:
    answer = await chat(client, max_tokens=5, max_completion_tokens=2)
    assert generator.requests[0].sampling.max_tokens == 2
    assert answer["choices"][0]["finish_reason"] == "length"


# -- messages --------------------------------------------------------------------------------------------------------


async def test_messages_reach_the_template_in_every_form(
    client: httpx2.AsyncClient, generator: FakeGenerator, tokens: Tokenizer
) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "name": "Ann", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
    ]
    await chat(client, messages=messages, tools=[{"type": "function", "function": {"name": "f"}}], tool_choice="auto")
    assert tokens.decode(generator.requests[0].prompt) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>\n"
        "<|im_start|>assistant\n<|im_end|>\n<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n"
    )


async def test_tools_and_template_arguments_are_passed_on(generator: FakeGenerator, tokens: Tokenizer) -> None:
    template = "{{ tools[0].function.name }} {{ messages[0].tool_calls[0].function.arguments.x }} {{ thinking }}"
    taught = Tokenizer(tokens._backend, template, tokens.special)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 41}'}}
    async with in_process(make_app(generator, taught)) as client:
        await chat(
            client,
            messages=[{"role": "assistant", "tool_calls": [call]}],
            tools=[{"type": "function", "function": {"name": "look_up"}}],
            chat_template_kwargs={"thinking": "off", "self": 1, "messages_": 2},
        )
    assert taught.decode(generator.requests[0].prompt) == "look_up 41 off"


async def test_a_final_message_can_be_continued(
    client: httpx2.AsyncClient, generator: FakeGenerator, tokens: Tokenizer
) -> None:
    messages = [*USER, {"role": "assistant", "content": "Well,"}]
    await chat(client, messages=messages, continue_final_message=True)
    assert tokens.decode(generator.requests[0].prompt).endswith("<|im_start|>assistant\nWell,")


# -- log-probabilities -----------------------------------------------------------------------------------------------


async def test_chat_logprobs(client: httpx2.AsyncClient, tokens: Tokenizer) -> None:
    answer = await chat(client, logprobs=True, top_logprobs=2, max_tokens=3)
    entries = answer["choices"][0]["logprobs"]["content"]
    ids = tokens.encode(ANSWER)[:3]
    assert [entry["token"] for entry in entries] == [tokens.decode([id]) for id in ids]
    assert bytes(entries[0]["bytes"]) == tokens.spelled[ids[0]]
    assert [len(entry["top_logprobs"]) for entry in entries] == [2, 2, 2]
    assert entries[0]["top_logprobs"][0] == {name: entries[0][name] for name in ("token", "logprob", "bytes")}
    bare = await chat(client, logprobs=True, max_tokens=1)
    assert bare["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


async def test_streamed_logprobs_join_to_the_whole_ones(client: httpx2.AsyncClient) -> None:
    body = {"messages": USER, "stream": True, "logprobs": True, "top_logprobs": 1}
    chunks = events((await client.post(CHAT, json=body)).text)
    streamed = [entry for chunk in chunks for entry in chunk["choices"][0]["logprobs"]["content"]]
    assert streamed == (await chat(client, logprobs=True, top_logprobs=1))["choices"][0]["logprobs"]["content"]


async def test_completion_logprobs_count_characters(tokens: Tokenizer) -> None:
    text = "a 😀 ü."
    ids = tokens.encode(text)
    generator = FakeGenerator(lambda request: ids, finish=FinishReason.LENGTH)
    async with in_process(make_app(generator, tokens)) as client:
        found = (await complete(client, logprobs=2))["choices"][0]
        body = {"prompt": "x", "max_tokens": 100, "logprobs": 2, "stream": True}
        chunks = events((await client.post(TEXT, json=body)).text)
    logprobs = found["logprobs"]
    assert set(logprobs) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert {len(column) for column in logprobs.values()} == {len(ids)}
    offsets = logprobs["text_offset"]
    assert offsets == sorted(offsets)
    assert offsets[0] == 0
    whole = {name: offset for name, offset in zip(logprobs["tokens"], offsets, strict=True) if "bytes:" not in name}
    assert all(text.startswith(name, offset) for name, offset in whole.items())
    assert any(name.startswith("bytes:\\x") for name in logprobs["tokens"]), "the emoji takes several tokens"
    assert len(logprobs["top_logprobs"][0]) == 2
    joined: dict[str, list[Any]] = {name: [] for name in logprobs}
    for chunk in chunks:
        for name, column in chunk["choices"][0]["logprobs"].items():
            joined[name] += column
    assert joined == logprobs


async def test_echo_puts_the_prompt_first_with_its_logprobs(
    client: httpx2.AsyncClient, generator: FakeGenerator, tokens: Tokenizer
) -> None:
    prompt = "Prefill and decode"
    found = (await complete(client, prompt=prompt, echo=True, logprobs=1, max_tokens=2))["choices"][0]
    assert found["text"].startswith(prompt + "The")
    logprobs, num_prompt = found["logprobs"], len(tokens.encode(prompt))
    assert "".join(logprobs["tokens"]) == found["text"]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert None not in logprobs["token_logprobs"][1:]
    assert logprobs["text_offset"][num_prompt] == len(prompt)
    assert generator.requests[0].sampling.prompt_logprobs == 1


async def test_echo_alone_gives_the_prompt_back(
    client: httpx2.AsyncClient, generator: FakeGenerator, tokens: Tokenizer
) -> None:
    ids = tokens.encode("Prefill and decode")
    answer = await complete(client, prompt=ids, echo=True, logprobs=0, max_tokens=0)
    (choice,) = answer["choices"]
    assert choice["text"] == "Prefill and decode"
    assert len(choice["logprobs"]["tokens"]) == len(ids)
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
    streamed = {"prompt": ids, "echo": True, "max_tokens": 3, "stream": True}
    chunks = events((await client.post(TEXT, json=streamed)).text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks).startswith("Prefill and decodeThe")


# -- refusals --------------------------------------------------------------------------------------------------------

IMAGE = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
WRONG_CHATS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": None}, "messages", "valid list"),
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": "hello"}, "messages", "valid list"),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "missing"),
    ({"messages": [*USER, {"role": "wizard", "content": "x"}]}, "messages[1].role", "'wizard'"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "valid string or input should be a valid"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "needs text"),
    ({"messages": [{"role": "user", "content": IMAGE}]}, "messages[0].content[1].type", "text only"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", "string"),
    ({"messages": [{"role": "user", "content": [7]}]}, "messages[0].content[0]", "valid string"),
    ({"temperature": -1}, "temperature", "between 0 and 100"),
    ({"temperature": "hot"}, "temperature", "valid number"),
    ({"temperature": True}, "temperature", "valid number"),
    ({"top_p": 0}, "top_p", "above 0"),
    ({"top_p": 1.5}, "top_p", "at most 1"),
    ({"top_k": -5}, "top_k", "-1"),
    ({"min_p": 2}, "min_p", "between 0 and 1"),
    ({"presence_penalty": 3}, "presence_penalty", "between -2 and 2"),
    ({"frequency_penalty": -3}, "frequency_penalty", "between -2 and 2"),
    ({"repetition_penalty": 0}, "repetition_penalty", "above 0"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": "16"}, "max_tokens", "valid integer"),
    ({"max_tokens": 1.5}, "max_tokens", "valid integer"),
    ({"max_tokens": 100_000}, "max_tokens", "maximum context length is 8192"),
    ({"max_completion_tokens": 100_000}, "max_completion_tokens", "maximum context length"),
    ({"min_tokens": -1}, "min_tokens", "at least 0"),
    ({"min_tokens": 9, "max_tokens": 5}, "min_tokens", "at most max_tokens"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 1000}, "n", "less than or equal to 128"),
    ({"stop": ["x"] * 10_000}, "stop", "10000"),
    ({"stop": ["a", ""]}, "stop", "empty"),
    ({"stop": "x" * 5000}, "stop", "5000"),
    ({"stop": [1]}, "stop[0]", "valid string"),
    ({"stop": {"a": 1}}, "stop", "valid"),
    ({"stop_token_ids": ["x"]}, "stop_token_ids[0]", "valid integer"),
    ({"stop_token_ids": [1, -1]}, "stop_token_ids[1]", "no token"),
    ({"stop_token_ids": [10**30]}, "stop_token_ids[0]", "no token"),
    ({"stop_token_ids": [1] * 2000}, "stop_token_ids", "2000"),
    ({"logit_bias": {"hello": 1}}, "logit_bias", "no token id"),
    ({"logit_bias": {"99999999": 1}}, "logit_bias", "no token id"),
    ({"logit_bias": {"5": 500}}, "logit_bias", "between -100 and 100"),
    ({"logit_bias": {str(i): 0 for i in range(2000)}}, "logit_bias", "2000"),
    ({"logprobs": 3}, "logprobs", "valid boolean"),
    ({"top_logprobs": 3}, "top_logprobs", "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "between 0 and 20"),
    ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    ({"guided_json": {"type": "object"}}, "guided_json", "not supported"),
    ({"best_of": 3}, "best_of", "not supported"),
    ({"tool_choice": "required"}, "tool_choice", "forced"),
    ({"tool_choice": {"type": "function"}}, "tool_choice", "forced"),
    ({"tools": "f"}, "tools", "valid list"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    ({"stream": True, "stream_options": {"include_usage": "yes"}}, "stream_options.include_usage", "boolean"),
    ({"chat_template": "{{ 1 }}"}, "chat_template", "checkpoint's own"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages", "field of its own"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message", "exclude"),
    ({"seed": 1.5}, "seed", "valid integer"),
]
WRONG_COMPLETIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": None}, "prompt", "missing"),
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": []}, "prompt", "not empty"),
    ({"prompt": {"a": 1}}, "prompt", "must be a string"),
    ({"prompt": ["a", 3]}, "prompt[1]", "not 3"),
    ({"prompt": ["a", ""]}, "prompt[1]", "empty"),
    ({"prompt": [1, "a"]}, "prompt[1]", "token id"),
    ({"prompt": [1, True]}, "prompt[1]", "token id"),
    ({"prompt": [True]}, "prompt[0]", "token id"),
    ({"prompt": [1, -1]}, "prompt[1]", "no token"),
    ({"prompt": [[1], [10**9]]}, "prompt[1][0]", "no token"),
    ({"prompt": [[1], []]}, "prompt[1]", "empty"),
    ({"prompt": ["x"] * 3000}, "prompt", "3000"),
    ({"prompt": ["x"] * 100, "n": 100}, "n", "10000 choices"),
    ({"prompt": [1] * 9000}, "prompt", "maximum context length is 8192 tokens. However, your prompt resulted in 9000"),
    ({"prompt": "hello " * 9000}, "prompt", "maximum context length is 8192"),
    ({"prompt": "x" * 1_000_000}, "prompt", "at least"),
    ({"max_tokens": 0}, "max_tokens", "echo"),
    ({"max_tokens": 8192}, "max_tokens", "maximum context length"),
    ({"logprobs": True}, "logprobs", "valid integer"),
    ({"logprobs": 21}, "logprobs", "between 0 and 20"),
    ({"logprobs": -1}, "logprobs", "between 0 and 20"),
    ({"suffix": "end"}, "suffix", "not supported"),
    ({"best_of": 2, "n": 1}, "best_of", "not supported"),
    ({"echo": "yes"}, "echo", "valid boolean"),
]


@pytest.mark.parametrize(("fields", "param", "said"), WRONG_CHATS, ids=str)
async def test_wrong_chats_are_refused_naming_the_field(
    client: httpx2.AsyncClient, generator: FakeGenerator, fields: dict[str, Any], param: str, said: str
) -> None:
    error = await refused(client, CHAT, {"messages": USER, **fields})
    assert error["param"] == param
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"
    assert not generator.requests


@pytest.mark.parametrize(("fields", "param", "said"), WRONG_COMPLETIONS, ids=lambda case: str(case)[:60])
async def test_wrong_completions_are_refused_naming_the_field(
    client: httpx2.AsyncClient, generator: FakeGenerator, fields: dict[str, Any], param: str, said: str
) -> None:
    error = await refused(client, TEXT, {"prompt": "hello", **fields})
    assert error["param"] == param
    assert said in error["message"]
    assert not generator.requests


async def test_trivial_values_of_unsupported_fields_pass(client: httpx2.AsyncClient) -> None:
    await complete(client, best_of=2, n=2, suffix="", response_format={"type": "text"})
    await chat(client, tool_choice="none", guided_json=None)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"x"', b'{"messages": NaN', b"\xff\xfe", b"null"])
async def test_bodies_that_are_no_object_are_refused(client: httpx2.AsyncClient, content: bytes) -> None:
    response = await client.post(CHAT, content=content, headers=JSON)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
async def test_numbers_that_are_none_are_refused(client: httpx2.AsyncClient, value: str) -> None:
    response = await client.post(
        CHAT, content=f'{{"messages": {json.dumps(USER)}, "temperature": {value}}}', headers=JSON
    )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "temperature"


async def test_half_a_surrogate_pair_is_refused(client: httpx2.AsyncClient) -> None:
    for path, body, param, status in [
        (CHAT, '{"messages": [{"role": "user", "content": "a \\ud83d b"}]}', "messages", 400),
        (TEXT, '{"prompt": "\\ud83d"}', "prompt", 400),
        (TEXT, '{"prompt": "x", "model": "\\ud83d"}', "model", 404),
        (TEXT, '{"prompt": "x", "logit_bias": {"\\ud83d": "y"}}', "logit_bias", 400),
    ]:
        response = await client.post(path, content=body, headers=JSON)
        assert response.status_code == status, body
        assert response.json()["error"]["param"] == param


async def test_a_body_must_say_that_it_is_json(client: httpx2.AsyncClient, generator: FakeGenerator) -> None:
    """As a web page of another origin, which may send anything but that, could else use a server on this machine."""
    content = json.dumps({"messages": USER})
    for headers in ({}, {"content-type": "application/x-www-form-urlencoded"}, {"content-type": "text/plain"}):
        response = await client.post(CHAT, content=content, headers=headers)
        assert response.status_code == 415
        assert "Content-Type: application/json" in response.json()["error"]["message"]
    assert not generator.requests


async def test_too_long_for_the_context_carries_openais_code(client: httpx2.AsyncClient) -> None:
    error = await refused(client, CHAT, {"messages": [{"role": "user", "content": "word " * 9000}]})
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert "8192" in error["message"]
    error = await refused(client, TEXT, {"prompt": "x", "max_tokens": 8192})
    assert error["code"] == "context_length_exceeded"


async def test_too_long_for_the_memory_is_refused_too(client: httpx2.AsyncClient, generator: FakeGenerator) -> None:
    generator.max_kv_tokens = 64
    error = await refused(client, TEXT, {"prompt": [5] * 64})
    assert "64" in error["message"]
    await complete(client, prompt=[5] * 60, max_tokens=None)
    assert generator.requests[0].sampling.max_tokens == 4, "the default shrinks to what is left"


async def test_an_unknown_model_is_openais_404(client: httpx2.AsyncClient) -> None:
    for path in (CHAT, TEXT, "/tokenize"):
        error = await refused(client, path, {"model": "gpt-5", "messages": USER, "prompt": "x"}, 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "gpt-5" in error["message"]


async def test_the_answer_carries_the_name_that_was_asked_for(client: httpx2.AsyncClient) -> None:
    assert (await chat(client, model="alias"))["model"] == "alias"
    assert (await chat(client, model=""))["model"] == "small"


FAILURES: list[tuple[Exception, int, str | None]] = [
    (RequestError("no such thing", param="prompt", status=422), 422, None),
    (OverloadedError("full", retry_after=2.2), 429, "rate_limit_exceeded"),
    (UnavailableError("no decode instance", retry_after=0.2), 503, "service_unavailable"),
    (InstanceGone("decode-0 died"), 500, "instance_failed"),
    (InstanceError("gave up"), 500, "instance_failed"),
    (ZeroDivisionError("a secret"), 500, "internal_error"),
]


@pytest.mark.parametrize(("error", "status", "code"), FAILURES, ids=lambda case: type(case).__name__)
@pytest.mark.parametrize("stream", [False, True])
async def test_failures_before_the_first_token_have_their_status(
    client: httpx2.AsyncClient, generator: FakeGenerator, error: Exception, status: int, code: str | None, stream: bool
) -> None:
    generator.error = error
    response = await client.post(CHAT, json={"messages": USER, "stream": stream, "n": 2})
    assert response.status_code == status
    told = response.json()["error"]
    assert told["code"] == code
    assert "secret" not in told["message"]
    if status in (429, 503):
        assert response.headers["retry-after"] == ("3" if status == 429 else "1")
        assert response.headers["retry-after-ms"] == ("2200" if status == 429 else "200")
    assert generator.open == 0


async def test_failures_after_the_first_token_are_an_event(
    client: httpx2.AsyncClient, generator: FakeGenerator
) -> None:
    generator.error, generator.error_at = InstanceError("decode-0 died"), 3
    response = await client.post(CHAT, json={"messages": USER, "stream": True})
    assert response.status_code == 200
    *chunks, last = events(response.text)
    assert len(chunks) == 3
    assert last == {
        "error": {"message": "decode-0 died", "type": "server_error", "param": None, "code": "instance_failed"}
    }
    whole = await client.post(CHAT, json={"messages": USER})
    assert whole.status_code == 500, "an answer that is not streamed is all or nothing"


async def test_one_failing_choice_ends_the_others(tokens: Tokenizer) -> None:
    def script(request: Any) -> list[int]:
        if request.sampling.seed == 1:
            raise InstanceError("decode-0 died")
        return [5] * 4000

    generator = FakeGenerator(script)
    async with in_process(make_app(generator, tokens)) as client:
        response = await client.post(CHAT, json={"messages": USER, "n": 2, "seed": 0})
    assert response.status_code == 500
    assert generator.open == 0
    assert generator.num_yielded < 100


async def test_a_generator_that_ends_without_a_last_token_is_an_error(tokens: Tokenizer) -> None:
    async with in_process(make_app(FakeGenerator(lambda request: []), tokens)) as client:
        error = await refused(client, CHAT, {"messages": USER}, 500)
    assert "before its last token" in error["message"]


# -- edge ------------------------------------------------------------------------------------------------------------


async def test_request_ids_are_echoed_or_made(client: httpx2.AsyncClient) -> None:
    named = await client.post(CHAT, json={"messages": USER}, headers={"x-request-id": "my-id-1"})
    assert named.headers["x-request-id"] == "my-id-1"
    assert named.json()["id"] == "chatcmpl-my-id-1"
    for headers in ({}, {"x-request-id": "x" * 1000}, {"x-request-id": "a b"}):
        other = await client.get("/v1/models", headers=headers)
        assert len(other.headers["x-request-id"]) == 32
    wrong = await client.post(CHAT, content=b"{", headers={**JSON, "x-request-id": "my-id-2"})
    assert wrong.headers["x-request-id"] == "my-id-2"
    assert (await client.get("/nowhere", headers={"x-request-id": "my-id-3"})).headers["x-request-id"] == "my-id-3"


async def test_keys_are_asked_for_but_by_probes(generator: FakeGenerator, tokens: Tokenizer) -> None:
    options = ApiOptions(("m",), api_keys=("one", "two"), metrics=lambda: (b"x 1\n", "text/plain"))
    async with in_process(make_app(generator, tokens, options)) as client:
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "one"},
            {"authorization": "Basic one"},
        ):
            response = await client.get("/v1/models", headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["x-request-id"]
        for key in ("one", "two"):
            assert (await client.get("/v1/models", headers={"authorization": f"Bearer {key}"})).status_code == 200
        for path in ("/health", "/ping", "/metrics"):
            assert (await client.get(path)).status_code == 200


async def test_large_bodies_are_refused(generator: FakeGenerator, tokens: Tokenizer) -> None:
    async def portions() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 100

    async with in_process(make_app(generator, tokens, ApiOptions(("m",), max_body=1000))) as client:
        announced = await client.post(CHAT, content=b" " * 2000)
        counted = await client.post(CHAT, content=portions())
        fits = await client.post(CHAT, json={"messages": USER})
    assert (announced.status_code, counted.status_code, fits.status_code) == (413, 413, 200)
    assert "1000 bytes" in announced.json()["error"]["message"]
    assert counted.json()["error"]["type"] == "invalid_request_error"


async def test_unknown_routes_and_methods_have_openais_body(client: httpx2.AsyncClient) -> None:
    missing = await client.get("/v1/embeddings")
    assert (missing.status_code, missing.json()["error"]["message"]) == (404, "There is no GET /v1/embeddings here.")
    wrong = await client.get(CHAT)
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (405, "invalid_request_error")


async def test_health_says_which_phase_is_missing(client: httpx2.AsyncClient, generator: FakeGenerator) -> None:
    ready = await client.get("/health")
    assert (ready.status_code, ready.json()["status"]) == (200, "ok")
    assert (await client.get("/ping")).status_code == 200
    generator.missing = ["decode"]
    waiting = await client.get("/health")
    assert (waiting.status_code, waiting.json()["missing"]) == (503, ["decode"])
    assert (await client.post("/ping")).status_code == 503


async def test_models_version_and_metrics(generator: FakeGenerator, tokens: Tokenizer) -> None:
    options = ApiOptions(("org/m", "alias"), metrics=lambda: (b"vllm:x 1\n", "text/plain; version=0.0.4"), root="/m")
    async with in_process(make_app(generator, tokens, options)) as client:
        models = (await client.get("/v1/models")).json()
        one = (await client.get("/v1/models/org/m")).json()
        missing = await client.get("/v1/models/other")
        metrics = await client.get("/metrics")
        version = (await client.get("/version")).json()["version"]
        schema = (await client.get("/openapi.json")).json()
    assert [card["id"] for card in models["data"]] == ["org/m", "alias"]
    assert one == models["data"][0]
    assert (one["max_model_len"], one["root"], one["object"]) == (8192, "/m", "model")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
    assert (metrics.content, metrics.headers["content-type"]) == (b"vllm:x 1\n", "text/plain; version=0.0.4")
    assert version == options.version
    assert {CHAT, TEXT, "/tokenize"} <= set(schema["paths"])


# -- /tokenize and /detokenize ---------------------------------------------------------------------------------------


async def test_tokenize_and_back(client: httpx2.AsyncClient, tokens: Tokenizer) -> None:
    ids = tokens.encode("hello world")
    found = (await client.post("/tokenize", json={"prompt": "hello world"})).json()
    assert found == {"count": len(ids), "max_model_len": 8192, "tokens": ids, "token_strs": None}
    strings = (await client.post("/tokenize", json={"prompt": "hello world", "return_token_strs": True})).json()
    assert strings["token_strs"] == [tokens.token(id) for id in ids]
    assert (await client.post("/detokenize", json={"tokens": ids})).json() == {"prompt": "hello world"}


async def test_tokenize_a_chat(client: httpx2.AsyncClient, generator: FakeGenerator) -> None:
    await chat(client)
    found = (await client.post("/tokenize", json={"model": "small", "messages": USER})).json()
    assert found["tokens"] == generator.requests[0].prompt
    bare = (await client.post("/tokenize", json={"messages": USER, "add_generation_prompt": False})).json()
    assert bare["count"] < found["count"]


async def test_tokenize_counts_beyond_the_context(client: httpx2.AsyncClient) -> None:
    assert (await client.post("/tokenize", json={"prompt": "x " * 20_000})).json()["count"] > 8192


async def test_tokenize_refuses(client: httpx2.AsyncClient) -> None:
    assert (await refused(client, "/tokenize", {}))["param"] == "prompt"
    assert (await refused(client, "/tokenize", {"prompt": 3}))["param"] == "prompt"
    assert (await refused(client, "/detokenize", {}))["param"] == "tokens"
    assert (await refused(client, "/detokenize", {"tokens": ["a"]}))["param"] == "tokens[0]"
    assert (await refused(client, "/detokenize", {"tokens": [10**9]}))["param"] == "tokens[0]"
