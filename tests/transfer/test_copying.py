"""Copies and digests: the C form equals the numpy form to the last bit, and no likely damage goes unnoticed."""

from __future__ import annotations

import ctypes
import logging
import platform
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distserve.native import BuildError, build, find_compiler
from distserve.transfer import copying
from distserve.transfer.copying import LINE, Bytes, Library, Reference, Units

SIZES = st.one_of(st.integers(1, 700), st.sampled_from([LINE, 512, 4096, 8 * LINE + 1, 9 * LINE - 1]))


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


def whole(size: int, num_units: int, first: int = 0) -> Units:
    """All units of a block, at places `first`, `first` + 1, ..."""
    return Units.of(size, [(i * size, i * size, first + i) for i in range(num_units)])


def digest(row: Bytes, size: int, first: int = 0) -> int:
    """Of one block of units."""
    (found,) = Reference().digests(row.reshape(1, -1), [0], whole(size, row.size // size, first))
    return int(found)


@st.composite
def jobs(draw: st.DrawFn) -> tuple[int, int, int, Units]:
    """(bytes of a source block, of a target block, seed, units in any order of either side, some left out)."""
    size, there, here = draw(SIZES), draw(st.integers(1, 20)), draw(st.integers(1, 20))
    count = draw(st.integers(0, min(there, here)))
    orders = [draw(st.permutations(range(n)))[:count] for n in (there, here)]
    places = draw(st.lists(st.integers(0, 2**32), min_size=count, max_size=count))
    moves = [(at * size, to * size, place) for at, to, place in zip(*orders, places, strict=True)]
    return there * size, here * size, draw(st.integers(0, 9)), Units.of(size, moves)


@settings(max_examples=80)
@given(job=jobs(), blocks=st.permutations(range(5)), count=st.integers(0, 5))
def test_both_forms_agree(library: Library, job: tuple[int, int, int, Units], blocks: list[int], count: int) -> None:
    from_block, to_block, seed, units = job
    blocks = blocks[:count]
    memory, targets = random(5, from_block, seed=seed), [6, 2, 1, 0, 4][:count]
    expected = Reference().digests(memory, blocks, units)
    assert (library.digests(memory, blocks, units) == expected).all()
    copies = np.zeros((2, 7, to_block), np.uint8)
    forms: list[Library | Reference] = [library, Reference()]
    for i, form in enumerate(forms):
        assert (form.copy(memory, blocks, copies[i], targets, units) == expected).all()
    wanted = np.zeros_like(copies[0])
    for block, target in zip(blocks, targets, strict=True):
        for at, to, _ in units.table.tolist():
            wanted[target, to : to + units.size] = memory[block, at : at + units.size]
    assert (copies == wanted).all()


@pytest.mark.parametrize("flags", [(), ("-mavx2",), ("-mavx512f",)])
@pytest.mark.parametrize("size", [256, 4096, 4096 + 33])
def test_each_processor_has_the_same_digest(library: Library, flags: tuple[str, ...], size: int) -> None:
    if flags and platform.machine() != "x86_64":
        pytest.skip("these flags are for x86-64")
    features = Path("/proc/cpuinfo").read_text().split() if flags else []
    if flags and flags[0][2:] not in features:
        pytest.skip(f"this processor has no {flags[0][2:]}")
    plain = Library(ctypes.CDLL(str(build(Path(copying.__file__).parent, ["copying.c"], (flags,)))))
    memory, copy, units, blocks = random(3, 11 * size), np.zeros((3, 11 * size), np.uint8), whole(size, 11), [0, 1, 2]
    expected = Reference().digests(memory, blocks, units)
    assert (plain.copy(memory, blocks, copy, blocks, units) == expected).all()
    assert (plain.digests(memory, blocks, units) == expected).all()
    assert (copy == memory).all()


@pytest.mark.parametrize("shift", [0, 1, 32])
def test_memory_that_is_not_aligned_is_copied_too(library: Library, shift: int) -> None:
    size = 4 * 512
    memory, room, units = random(2, size), np.zeros(2 * size + 128, np.uint8), whole(512, 4)
    start = -room.ctypes.data % 64 + shift
    into = room[start : start + 2 * size].reshape(2, size)
    found = library.copy(memory, [0, 1], into, [1, 0], units)
    assert (found == library.digests(memory, [0, 1], units)).all()
    assert (into[::-1] == memory).all()
    assert not room[:start].any()
    assert not room[start + 2 * size :].any()


def test_digests_are_what_they_were() -> None:
    """Two sides of a pull may run unlike versions: what they compare must not change unnoticed."""
    rows = np.arange(2 * 1100, dtype=np.uint64).astype(np.uint8).reshape(2, 1100)
    found = Reference().digests(rows, [0, 1], whole(275, 4, first=3))
    assert [f"{digest:016x}" for digest in found.tolist()] == ["a2ec175253129244", "57e5a5c5c097d6f9"]


@settings(max_examples=60)
@given(order=st.permutations(range(12)), cuts=st.sets(st.integers(1, 11), max_size=4))
def test_a_block_has_one_digest_however_its_units_are_shared(order: Sequence[int], cuts: set[int]) -> None:
    """Units dealt to several memories, in any order: the sum is that of the whole."""
    size, block = 96, random(1, 12 * 96, seed=3)
    total, edges = np.zeros(1, np.uint64), [0, *sorted(cuts), 12]
    for start, end in pairwise(edges):
        mine = list(order[start:end])
        memory = np.concatenate([block[:, unit * size : (unit + 1) * size] for unit in mine], axis=1)
        held = Units.of(size, [(i * size, i * size, unit) for i, unit in enumerate(mine)])
        total += copying.load().digests(np.ascontiguousarray(memory), [0], held)
    assert (total == Reference().digests(block, [0], whole(size, 12))).all()


@given(bit=st.integers(0, 8 * 1100 - 1), fill=st.sampled_from([0, 0xFF, None]))
def test_a_flipped_bit_changes_the_digest(bit: int, fill: int | None) -> None:
    row = random(1100) if fill is None else np.full(1100, fill, np.uint8)
    other = row.copy()
    other[bit // 8] ^= 1 << bit % 8
    assert digest(row, 275) != digest(other, 275)


@given(word=st.integers(0, 136), value=st.integers(1, 2**64 - 1))
def test_damage_of_one_word_changes_the_digest(word: int, value: int) -> None:
    row = random(1096)
    other = row.copy()
    other.view("<u8")[word] ^= np.uint64(value)
    assert digest(row, 1096) != digest(other, 1096)


@given(first=st.integers(0, 1099), second=st.integers(0, 1099), bit=st.integers(0, 7), other_bit=st.integers(0, 7))
def test_two_flipped_bits_change_the_digest(first: int, second: int, bit: int, other_bit: int) -> None:
    row = random(1100)
    other = row.copy()
    other[first] ^= 1 << bit
    other[second] ^= 1 << other_bit
    assert (digest(row, 550) == digest(other, 550)) == (first == second and bit == other_bit)


@given(
    words=st.lists(st.integers(0, 255), min_size=2, max_size=2, unique=True),
    width=st.sampled_from([2, 4, 8, 64, 128]),
    size=st.sampled_from([64, 128, 2048, 32768]),
)
def test_places_exchanged_change_the_digest(words: list[int], width: int, size: int) -> None:
    """Inside a unit, between units, and units as a whole."""
    row = random(32768)
    pieces = row.reshape(-1, width)
    other = pieces.copy()
    other[words] = pieces[words[::-1]]
    same = bool((other == pieces).all())
    assert (digest(row, size) == digest(other.reshape(row.shape), size)) == same


@pytest.mark.parametrize("fill", [0, 0xFF])
def test_equal_units_exchanged_with_others_are_seen(fill: int) -> None:
    """A fresh cache is full of equal units: one that is not must be in its place."""
    row = np.full(4096, fill, np.uint8)
    found = set()
    for unit in range(64):
        one = row.copy()
        one[unit * 64 : unit * 64 + 64] = np.arange(64)
        found.add(digest(one, 64))
    assert len(found) == 64


@pytest.mark.parametrize("size", [LINE, 3 * LINE + 8])
def test_zeros_of_another_length_have_another_digest(size: int) -> None:
    assert digest(np.zeros(size, np.uint8), size) != digest(np.zeros(size + 1, np.uint8), size + 1)


def test_a_block_that_is_not_there_is_refused(library: Library) -> None:
    memory, units = random(2, 512), whole(64, 8)
    for form in (library, Reference()):
        for blocks in ([2], [-1], [0, 2]):
            with pytest.raises(IndexError, match="of 2"):
                form.digests(memory, blocks, units)
    assert library.digests(memory, [], units).tolist() == []
    assert library.digests(memory, [1], Units.of(64, [])).tolist() == [0]


def test_without_a_compiler_numpy_copies_and_says_so_once(fresh: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert isinstance(copying.load(), Reference)
        assert copying.load() is copying.load()
    (record,) = caplog.records
    assert "install gcc or clang" in record.getMessage()
