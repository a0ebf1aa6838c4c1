"""Copies and digests: the C form equals the numpy form to the last bit, and no likely damage goes unnoticed."""

from __future__ import annotations

import ctypes
import logging
import platform
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distserve.native import BuildError, build, find_compiler
from distserve.transfer import copying
from distserve.transfer.copying import ROUND, Bytes, Library, Reference, digest_rows

SIZES = st.one_of(st.integers(1, 2000), st.sampled_from([ROUND, 6 * ROUND, 6 * ROUND + 64, 6 * ROUND + 1]))


@pytest.fixture(scope="module")
def library() -> Library:
    try:
        find_compiler()
    except BuildError:
        pytest.skip("no C compiler on this machine")
    found = copying.load()
    assert isinstance(found, Library)
    return found


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache and no compiler; afterwards the old state is back."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    copying.load.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    copying.load.cache_clear()


def random(*shape: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@settings(max_examples=60)
@given(size=SIZES, seed=st.integers(0, 9))
def test_both_forms_agree(library: Library, size: int, seed: int) -> None:
    memory, blocks = random(5, size, seed=seed), [3, 0, 4]
    assert library.digests(memory, blocks) == Reference().digests(memory, blocks)
    copies = np.zeros((2, 7, size), np.uint8)
    forms: list[Library | Reference] = [library, Reference()]
    found = [form.copy(memory, blocks, copies[i], [6, 2, 1]) for i, form in enumerate(forms)]
    assert found == [library.digests(memory, blocks)] * 2
    assert (copies[0] == copies[1]).all()
    assert (copies[0][[6, 2, 1]] == memory[blocks]).all()
    assert not copies[0][[0, 3, 4, 5]].any()


@pytest.mark.parametrize("flags", [(), ("-mavx2",), ("-mavx512f",)])
def test_each_processor_has_the_same_digest(library: Library, flags: tuple[str, ...]) -> None:
    if flags and platform.machine() != "x86_64":
        pytest.skip("these flags are for x86-64")
    features = Path("/proc/cpuinfo").read_text().split() if flags else []
    if flags and flags[0][2:] not in features:
        pytest.skip(f"this processor has no {flags[0][2:]}")
    plain = Library(ctypes.CDLL(str(build(Path(copying.__file__).parent, ["copying.c"], (flags,)))))
    memory, copy = random(3, 9 * ROUND + 33), np.zeros((3, 9 * ROUND + 33), np.uint8)
    blocks = [0, 1, 2]
    assert plain.copy(memory, blocks, copy, blocks) == library.digests(memory, blocks) == plain.digests(memory, blocks)
    assert (copy == memory).all()


@pytest.mark.parametrize("shift", [0, 1, 32])
def test_memory_that_is_not_aligned_is_copied_too(library: Library, shift: int) -> None:
    size = 4 * ROUND
    memory, whole = random(2, size), np.zeros(2 * size + 128, np.uint8)
    start = -whole.ctypes.data % 64 + shift
    into = whole[start : start + 2 * size].reshape(2, size)
    assert library.copy(memory, [0, 1], into, [1, 0]) == library.digests(memory, [0, 1])
    assert (into[::-1] == memory).all()
    assert not whole[:start].any()
    assert not whole[start + 2 * size :].any()


def test_digests_are_what_they_were() -> None:
    """Two sides of a pull may run unlike versions: what they compare must not change unnoticed."""
    rows = np.arange(2 * 1100, dtype=np.uint64).astype(np.uint8).reshape(2, 1100)
    assert [f"{digest:016x}" for digest in digest_rows(rows)] == ["4689840fd0431af6", "e5eb7279883cce0a"]
    assert digest_rows(rows[:, :0]) != digest_rows(rows[:, :1])


@given(bit=st.integers(0, 8 * 1100 - 1), fill=st.sampled_from([0, 0xFF, None]))
def test_a_flipped_bit_changes_the_digest(bit: int, fill: int | None) -> None:
    row = random(1, 1100) if fill is None else np.full((1, 1100), fill, np.uint8)
    other = row.copy()
    other[0, bit // 8] ^= 1 << bit % 8
    assert digest_rows(row) != digest_rows(other)


@given(first=st.integers(0, 1099), second=st.integers(0, 1099), bit=st.integers(0, 7), other_bit=st.integers(0, 7))
def test_two_flipped_bits_change_the_digest(first: int, second: int, bit: int, other_bit: int) -> None:
    row = random(1, 1100)
    other = row.copy()
    other[0, first] ^= 1 << bit
    other[0, second] ^= 1 << other_bit
    assert (digest_rows(row) == digest_rows(other)) == (first == second and bit == other_bit)


@given(words=st.lists(st.integers(0, 255), min_size=2, max_size=2, unique=True), width=st.sampled_from([2, 4, 8, 64]))
def test_places_exchanged_change_the_digest(words: list[int], width: int) -> None:
    row = random(1, 64 * ROUND)
    pieces = row.reshape(-1, width)
    other = pieces.copy()
    other[words] = pieces[words[::-1]]
    same = bool((other == pieces).all())
    assert (digest_rows(row) == digest_rows(other.reshape(row.shape))) == same


@pytest.mark.parametrize("size", [ROUND, 3 * ROUND + 8])
def test_zeros_of_another_length_have_another_digest(size: int) -> None:
    assert digest_rows(np.zeros((1, size), np.uint8)) != digest_rows(np.zeros((1, size + 1), np.uint8))


def test_a_block_that_is_not_there_is_refused(library: Library) -> None:
    memory = random(2, ROUND)
    for form in (library, Reference()):
        for blocks in ([2], [-1], [0, 2]):
            with pytest.raises(IndexError, match="of 2"):
                form.digests(memory, blocks)
    assert library.digests(memory, []) == ()


def test_without_a_compiler_numpy_copies_and_says_so_once(fresh: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert isinstance(copying.load(), Reference)
        assert copying.load() is copying.load()
    (record,) = caplog.records
    assert "install gcc or clang" in record.getMessage()
