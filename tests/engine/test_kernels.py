"""The C kernels: how they are built and found, and what they compute, against fp64 and against themselves."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.oracle import EPSILON, distance
from tests.engine.support import multiplying_in
from torch import Tensor

from distserve import machine
from distserve.engine import kernels
from distserve.engine.kernels import bindings
from distserve.engine.kernels.build import build
from distserve.errors import UsageError
from distserve.native import BuildError, find_compiler

DTYPES = [torch.float32, torch.bfloat16]


def has_compiler() -> bool:
    try:
        find_compiler()
    except BuildError:
        return False
    return True


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no C compiler on this machine")


@pytest.fixture(scope="module")
def library() -> kernels.Kernels:
    if not has_compiler():
        pytest.skip("no C compiler on this machine")
    found = kernels.load()
    if found is None:
        pytest.skip(f"kernels are switched off by {machine.KERNELS_DIAL}")
    return found


@pytest.fixture(scope="module", params=["tiles", "vectors"])
def packing(request: pytest.FixtureRequest, library: kernels.Kernels) -> Iterator[kernels.Kernels]:
    """Kernels that multiply packed weights, with each unit that this processor has for it."""
    with multiplying_in(request.param) as chosen:
        yield chosen


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and a process that has loaded nothing yet; afterwards the old state is back."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bindings.load.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    bindings.load.cache_clear()
    bindings.load()


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# How they come to be


@needs_compiler
def test_builders_at_the_same_time_agree(fresh: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        made = set(pool.map(lambda _: build(), range(2)))
    assert len(made) == 1
    (file,) = made
    before = file.stat().st_mtime_ns
    assert build() == file
    assert file.stat().st_mtime_ns == before, "a second build must come from the cache"
    assert list(file.parent.iterdir()) == [file], "no half-made file may stay behind"


def test_without_a_compiler_torch_computes_and_says_so_once(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.delenv("CC", raising=False)
    with caplog.at_level(logging.WARNING):
        assert kernels.load() is None
        assert kernels.load() is None
    (record,) = caplog.records
    assert "install gcc or clang" in record.getMessage()


def test_a_compiler_that_fails_is_reported(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = fresh / "broken-cc"
    broken.write_text("#!/bin/sh\necho 'broken-cc: no such target' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(BuildError, match="no such target"):
        build()


def test_the_dial(monkeypatch: pytest.MonkeyPatch, fresh: Path) -> None:
    monkeypatch.setenv(machine.KERNELS_DIAL, "off")
    assert kernels.load() is None
    monkeypatch.setenv(machine.KERNELS_DIAL, "fast")
    with pytest.raises(UsageError, match="auto, vectors, generic, off"):
        machine.kernels()


@needs_compiler
def test_the_command_says_what_was_built() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "distserve.engine.kernels"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("CPU kernels: ready")


# Matrix products


@settings(max_examples=60)
@given(rows=st.integers(1, 100), inputs=st.integers(1, 200), outputs=st.integers(1, 100), bias=st.booleans())
def test_products_are_right(packing: kernels.Kernels, rows: int, inputs: int, outputs: int, bias: bool) -> None:
    weight, x = random(outputs, inputs), random(rows, inputs, seed=1)
    shift = random(outputs, seed=2) if bias else None
    packed = kernels.PackedWeight(packing, weight, shift)
    wanted = F.linear(x.double(), weight.double(), None if shift is None else shift.double())
    assert distance(packed.multiply(x), wanted) < EPSILON[torch.bfloat16]
    assert distance(packed.logits(x), wanted) < 1e-5


@settings(max_examples=40)
@given(rows=st.integers(1, 70), inputs=st.integers(1, 130), half=st.integers(1, 70), bias=st.booleans())
def test_gated_products_are_right(packing: kernels.Kernels, rows: int, inputs: int, half: int, bias: bool) -> None:
    weight, x = random(2 * half, inputs), random(rows, inputs, seed=1)
    shift = random(2 * half, seed=2) if bias else None
    got = kernels.PackedWeight(packing, weight, shift, gated=True).multiply(x)
    gate, up = F.linear(x.double(), weight.double(), None if shift is None else shift.double()).chunk(2, -1)
    assert got.shape == (rows, half)
    assert distance(got, F.silu(gate) * up) < EPSILON[torch.bfloat16]


def test_no_rows_no_product(packing: kernels.Kernels) -> None:
    assert kernels.PackedWeight(packing, random(40, 64)).multiply(random(0, 64)).shape == (0, 40)


@pytest.mark.parametrize("inputs", [64, 70])
def test_a_row_reads_nothing_but_itself(packing: kernels.Kernels, inputs: int) -> None:
    """Neighbours that are NaN, in other rows and beyond a row's end, stay where they are."""
    packed = kernels.PackedWeight(packing, random(33, inputs))
    wide = torch.full((19, 2 * inputs), float("nan"), dtype=torch.bfloat16)
    wide[::2, :inputs] = random(10, inputs, seed=1)
    got = packed.multiply(wide[:, :inputs])
    assert torch.equal(got[::2], packed.multiply(wide[::2, :inputs].contiguous()))
    assert got[1::2].isnan().all()


@pytest.mark.parametrize("gated", [False, True])
def test_a_row_does_not_depend_on_its_batch(packing: kernels.Kernels, gated: bool) -> None:
    packed = kernels.PackedWeight(packing, random(576, 576), gated=gated)
    x = random(700, 576, seed=1)
    whole = packed.multiply(x)
    for first, last in ((0, 1), (3, 20), (5, 37), (31, 64), (100, 148), (0, 512), (511, 700)):
        assert torch.equal(packed.multiply(x[first:last]), whole[first:last]), (first, last)


def test_threads_change_nothing(packing: kernels.Kernels) -> None:
    packed = kernels.PackedWeight(packing, random(300, 200))
    x = random(90, 200, seed=1)
    alone = packed.multiply(x), packed.multiply(x[:3])
    packing.set_num_threads(2)
    try:
        together = packed.multiply(x), packed.multiply(x[:3])
    finally:
        packing.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@settings(max_examples=20)
@given(rows=st.integers(1, 90), inputs=st.integers(1, 100))
def test_rows_come_back_as_they_were(packing: kernels.Kernels, rows: int, inputs: int) -> None:
    weight = random(rows, inputs)
    packed = kernels.PackedWeight(packing, weight)
    ids = torch.arange(rows).flip(0)
    assert torch.equal(packed.rows(ids), weight[ids])


@pytest.mark.parametrize("bad", [-1, 50])
def test_a_row_that_is_not_there(packing: kernels.Kernels, bad: int) -> None:
    with pytest.raises(IndexError, match="vocabulary of 50"):
        kernels.PackedWeight(packing, random(50, 64)).rows(torch.tensor([3, bad]))


def test_packed_memory_is_one_copy_in_the_arena(packing: kernels.Kernels) -> None:
    arena = bindings._Arena()
    first, second = arena.take(1000), arena.take(64)
    assert first.data_ptr() % 64 == 0
    assert second.data_ptr() == first.data_ptr() + 1024
    large = arena.take(40 << 20)
    assert large.numel() == 40 << 20
    large.fill_(1)


# Row-wise kernels


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=30)
@given(rows=st.integers(0, 20), width=st.integers(1, 600))
def test_norms_are_right(library: kernels.Kernels, dtype: torch.dtype, rows: int, width: int) -> None:
    x, weight = random(rows, width, dtype=dtype), random(width, dtype=dtype, seed=1)
    residual = random(rows, width, dtype=torch.float32, seed=2)

    def norm(y: Tensor) -> Tensor:
        return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5) * weight.double()

    assert distance(library.rms_norm(x, None, weight, 1e-5), norm(x.double())) < 2 * EPSILON[dtype]
    total = residual + x.float()
    got = library.rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, total)
    assert distance(got, norm(total.double())) < 2 * EPSILON[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=20)
@given(rows=st.integers(0, 12), width=st.integers(1, 300), size=st.sampled_from([1.0, 30.0, 1000.0]))
def test_activations_are_right(
    library: kernels.Kernels, dtype: torch.dtype, rows: int, width: int, size: float
) -> None:
    x = random(rows, 2 * width, dtype=dtype) * size
    gate, up = x.double().chunk(2, -1)
    assert distance(library.silu_mul(x), F.silu(gate) * up) < 4 * EPSILON[dtype]
