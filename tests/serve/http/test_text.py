"""Text that comes piece by piece is the text that comes at once: whole characters, exact stops."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distserve.request import FinishReason, Token
from distserve.serve.http.text import StopSearch, StopStrings, TextStream, Utf8

BYTES = [bytes([byte]) for byte in range(256)]  # a vocabulary of single bytes: token id = byte
few_letters = st.text(alphabet="ab😀é", max_size=40)  # so that stop strings occur, overlap and almost occur


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    """`data` in portions that end at the `cuts` (any integers)."""
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[start:end] for start, end in pairwise(places)]


def run(stream: TextStream, tokens: list[Token], portion: int) -> list[str]:
    texts = []
    for start in range(0, len(tokens), portion):
        texts.append(stream.feed(tokens[start : start + portion]))
        if stream.finish is not None:
            break
    return texts


def as_tokens(pieces: list[bytes], finish: FinishReason = FinishReason.LENGTH) -> list[Token]:
    return [Token(i, finish if i == len(pieces) - 1 else None) for i in range(len(pieces))]


def first_stop(text: str, stops: list[str], include: bool) -> str:
    """The slow, obvious cut: the stop string that ends first, of those the one that begins first."""
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    if not found:
        return text
    end, start = min(found)
    return text[: end if include else start]


@given(st.binary(max_size=60), st.lists(st.integers(0, 60), max_size=20))
def test_any_bytes_in_any_portions_decode_as_they_do_at_once(data: bytes, cuts: list[int]) -> None:
    pieces = split(data, cuts)
    utf8 = Utf8()
    texts = [utf8.decode(piece, i == len(pieces) - 1) for i, piece in enumerate(pieces)]
    assert "".join(texts) == data.decode("utf-8", "replace")


@given(st.text(max_size=40), st.lists(st.integers(0, 160), max_size=40))
def test_valid_text_never_shows_a_replacement_or_half_a_character(text: str, cuts: list[int]) -> None:
    utf8, seen = Utf8(), ""
    for piece in split(text.encode(), cuts):
        seen += utf8.decode(piece)
        assert text.startswith(seen)
    assert seen == text
    assert utf8.decode(b"", final=True) == ""


def test_a_character_that_never_ends_is_replaced_at_the_end_only() -> None:
    stream = TextStream(BYTES)
    emoji = "😀".encode()
    assert stream.feed([Token(byte) for byte in b"a" + emoji[:3]]) == "a"
    assert stream.feed([Token(ord("b"), FinishReason.LENGTH)]) == "\ufffdb"
    cut = TextStream(BYTES)
    assert cut.feed([Token(emoji[0])]) == ""
    assert cut.feed([Token(emoji[1], FinishReason.LENGTH)]) == "\ufffd"


@settings(max_examples=400)
@given(
    few_letters,
    st.lists(st.text(alphabet="ab😀é", min_size=1, max_size=5), min_size=1, max_size=4),
    st.lists(st.integers(0, 200), max_size=40),
    st.integers(1, 3),
    st.booleans(),
)
def test_stop_strings_cut_where_searching_the_whole_text_would(
    text: str, stops: list[str], cuts: list[int], portion: int, include: bool
) -> None:
    pieces = split(text.encode(), cuts) or [b""]
    tokens = as_tokens(pieces)
    stream = TextStream(pieces, StopStrings(stops), include_stop=include)
    texts = run(stream, tokens, portion)
    expected = first_stop(text, stops, include)
    assert "".join(texts) == expected
    if any(stop in text for stop in stops):
        assert stream.finish is FinishReason.STOP
        assert stream.stop in stops
    else:
        assert stream.finish is FinishReason.LENGTH
        assert stream.stop is None
        assert stream.num_tokens == len(pieces)


@given(few_letters, st.lists(st.text(alphabet="ab😀é", min_size=1, max_size=5), min_size=1, max_size=4))
def test_only_what_could_begin_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    search, given_out = StopSearch(StopStrings(stops), include=False), ""
    for i, character in enumerate(text):
        given_out += search.feed(character)
        if search.found is not None:
            return
        so_far = text[: i + 1]
        waiting = so_far[len(given_out) :]
        longest = max(
            (size for stop in stops for size in range(len(stop)) if so_far.endswith(stop[:size])),
            default=0,
        )
        assert len(waiting) == longest
    assert given_out + search.flush() == text


def test_tokens_behind_the_stop_string_are_not_counted() -> None:
    pieces = [b"one ", b"st", b"op here", b" and on"]
    stream = TextStream(pieces, StopStrings(["stop"]))
    assert stream.feed(as_tokens(pieces)) == "one "
    assert (stream.num_tokens, stream.stop) == (3, "stop")


def test_stop_strings_do_not_count_before_min_tokens() -> None:
    pieces = [b"stop", b" a ", b"stop", b" b"]
    stream = TextStream(pieces, StopStrings(["stop"]), min_tokens=2)
    assert "".join(run(stream, as_tokens(pieces), 1)) == "stop a "
    assert stream.num_tokens == 3


@pytest.mark.parametrize(("include", "expected"), [(False, "text"), (True, "text<end>")])
def test_a_token_that_stops_is_text_only_where_asked_for(include: bool, expected: str) -> None:
    pieces = [b"text", b"<end>"]
    stream = TextStream(pieces, include_stop=include)
    assert "".join(run(stream, as_tokens(pieces, FinishReason.STOP), 1)) == expected
    assert stream.stop == 1


def test_ids_beyond_the_vocabulary_add_no_text() -> None:
    stream = TextStream([b"a"])
    assert stream.feed([Token(0), Token(7), Token(0, FinishReason.LENGTH)]) == "aa"
    assert stream.num_tokens == 3


def test_a_thousand_stop_strings_cost_no_more_per_character_than_one() -> None:
    """Counts steps of the automaton instead of time: failing over happens at most once per character on average."""
    stops = StopStrings([f"stop number {i}" for i in range(1000)])
    steps = 0

    class Counting(dict[str, int]):
        def get(self, key: str, default: int | None = None) -> int | None:  # type: ignore[override]
            nonlocal steps
            steps += 1
            return super().get(key, default)

    stops.goto = [Counting(edges) for edges in stops.goto]
    text = "stop numbe stop number stop stop number 99" * 50
    search = StopSearch(stops, include=False)
    search.feed(text[:40])
    assert steps <= 2 * 40
    assert search.found is None
