import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve.bench.stream import Answer, BadStreamError


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text(content: str, finish: str | None = None, **more: Any) -> bytes:
    return event(choices=[{"text": content, "finish_reason": finish}], **more)


def chat(delta: dict[str, Any], finish: str | None = None) -> bytes:
    return event(choices=[{"delta": delta, "finish_reason": finish}])


USAGE = event(choices=[], usage={"prompt_tokens": 7, "completion_tokens": 9})
DONE = b"data: [DONE]\n\n"


def read(*reads: bytes) -> Answer:
    """An answer whose n-th network read came at second n."""
    answer = Answer()
    for now, data in enumerate(reads, 1):
        answer.feed(data, float(now))
    answer.close()
    return answer


def test_first_and_last_token_and_the_servers_count() -> None:
    answer = read(text("a"), text("b"), text("c", "length"), USAGE, DONE)
    assert (answer.first, answer.last, answer.num_events) == (1.0, 3.0, 3)
    assert (answer.prompt_tokens, answer.output_tokens) == (7, 9)
    assert answer.done
    assert answer.finished
    assert answer.error is None


def test_a_role_alone_is_no_token_but_an_empty_text_is() -> None:
    answer = read(
        chat({"role": "assistant", "content": ""}), chat({"content": ""}), chat({"content": "a"}), chat({}, "stop")
    )
    assert (answer.first, answer.last, answer.num_events) == (2.0, 4.0, 3)


@pytest.mark.parametrize(
    "delta", [{"role": "assistant", "content": "a"}, {"role": "assistant", "reasoning_content": "a"}]
)
def test_a_role_with_content_is_a_token(delta: dict[str, Any]) -> None:
    assert read(chat(delta), chat({"content": "b"})).first == 1.0


def test_usage_before_the_first_token_and_after_each_is_no_harm() -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 1}
    answer = read(
        event(choices=[], usage=usage), text("a", usage=usage), text("b", usage={**usage, "completion_tokens": 2}), DONE
    )
    assert (answer.first, answer.last, answer.num_events, answer.output_tokens) == (2.0, 3.0, 2, 2)


def test_comments_fields_and_line_ends_of_other_servers() -> None:
    answer = read(
        b": ping\r\n\r\n", b"event: x\r\nid: 3\r\n" + text("a").replace(b"\n", b"\r\n"), b"data:[DONE]\r\n\r\n"
    )
    assert (answer.first, answer.num_events, answer.done) == (2.0, 1, True)


def test_text_that_looks_like_the_protocol_is_text() -> None:
    answer = read(text("data: [DONE]\n\ndata: {}"), text('"choices": []'), DONE)
    assert (answer.num_events, answer.done) == (2, True)


def test_an_error_in_the_stream() -> None:
    answer = read(text("a"), event(error={"message": "instance gone", "code": 500}), DONE)
    assert answer.error == "instance gone"
    assert answer.num_events == 1
    assert read(event(error="at once")).error == "at once"


def test_a_stream_that_breaks_off() -> None:
    answer = read(text("a"), text("b")[:20])
    assert (answer.first, answer.done, answer.finished) == (1.0, False, False)
    assert read(text("a"), text("b", "stop").rstrip()).finished
    assert read().first is None


@pytest.mark.parametrize(
    "data", [b"data: hello\n\n", b"data: [1]\n\n", b'data: {"choices": [3]}\n\n', b'data: {"choices": 3}\n\n']
)
def test_what_is_no_event_is_refused(data: bytes) -> None:
    with pytest.raises(BadStreamError):
        read(data)


@given(
    texts=st.lists(st.text(max_size=5), min_size=1, max_size=12),
    cuts=st.lists(st.integers(1, 400), max_size=12),
    carriage=st.booleans(),
    in_chat=st.booleans(),
)
def test_the_network_may_cut_anywhere(texts: list[str], cuts: list[int], carriage: bool, in_chat: bool) -> None:
    ends = [None] * (len(texts) - 1) + ["stop"]
    events = [chat({"content": t}, e) if in_chat else text(t, e) for t, e in zip(texts, ends, strict=True)]
    whole = b"".join([chat({"role": "assistant", "content": ""})] * in_chat + events + [USAGE, DONE])
    if carriage:
        whole = whole.replace(b"\n", b"\r\n")
    marks = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    answer = read(*(whole[a:b] for a, b in itertools.pairwise(marks)))
    assert answer.num_events == len(texts)
    assert (answer.output_tokens, answer.done, answer.finished, answer.error) == (9, True, True, None)
    assert answer.first is not None
    assert answer.last is not None
    assert answer.first <= answer.last
