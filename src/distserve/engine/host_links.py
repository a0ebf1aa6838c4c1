"""Links between ranks of one host on CPUs: sums, gathers and activations through memory that all of them map. See
`collectives.Links`; how they meet there without a lock is in `host_links.c`.

One rank's numbers reach another in some microseconds, where a socket takes a hundred, and sums are added in the order
of the ranks: a token's numbers do not depend on what else is in the batch, as with one rank.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distserve.engine.parallel import Place
from distserve.native import BuildError, build

_LINE = 64  # bytes of a counter
_SLOT = 1 << 18  # floats of a rank's part of a board
_BOXES, _BOX = 4, 8 << 20  # host_links.c; bytes. What is never written to takes no memory.
_PAUSE = 2e-3  # seconds between two looks for the first rank
_LOOKS = 500  # at a counter before sleeping, some ten microseconds: less than to fall asleep and to be woken

_pointer, _int = ctypes.c_void_p, ctypes.c_int64


class _Stage(ctypes.Structure):
    """`Stage` of host_links.c."""

    _fields_ = [
        *(("arrived", _pointer), ("boards", _pointer)),
        *((name, _int) for name in ("size", "index", "slot", "looks")),
        ("generation", ctypes.c_uint32),
    ]


class _Way(ctypes.Structure):
    """`Way` of host_links.c."""

    _fields_ = [
        *((name, _pointer) for name in ("sent", "taken", "boxes")),
        *((name, _int) for name in ("size", "looks")),
        ("number", ctypes.c_uint32),
    ]


@functools.cache
def library() -> ctypes.CDLL | None:
    """None where there is no Linux or no compiler."""
    if sys.platform != "linux":
        return None
    try:
        found = ctypes.CDLL(str(build(Path(__file__).parent, ("host_links.c",))))
    except (BuildError, OSError):
        return None
    found.ds_sum.argtypes, found.ds_sum.restype = (_pointer, _pointer, _int), _int
    found.ds_gather_parts.argtypes = (_pointer, _pointer, _int, _pointer, _pointer)
    found.ds_gather_parts.restype = None
    for function in (found.ds_send, found.ds_receive):
        function.argtypes, function.restype = (_pointer, _pointer, _int), None
    return found


class HostLinks:
    """See `collectives.Links`. `path`: a file that is not there yet, in which the first rank tells the others where the
    memory is; without it they wait for it."""

    def __init__(self, native: ctypes.CDLL, place: Place, path: Path) -> None:
        sharding = place.sharding
        self.member, self._native = place.member, native
        looks = _LOOKS if sharding.num_ranks <= (os.cpu_count() or 1) else 0  # the others wait for this very core
        board = 2 * sharding.tp * _SLOT * 4
        stage = sharding.tp * _LINE + board
        way = 2 * _LINE + _BOXES * _BOX
        stages = sharding.pp * _pages(stage)
        size = stages + sharding.num_ranks * _pages(way)
        self._file = _create(path, size) if place.rank == 0 else _find(path)
        self._memory = mmap.mmap(self._file, size)
        self._base = torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr()

        at = self._base + place.stage * _pages(stage)
        shape = (sharding.tp, self.member.index, _SLOT, looks)
        self._stage = _Stage(at, at + sharding.tp * _LINE, *shape, 0)
        self.summer: tuple[int, int] | None = (_address(native.ds_sum), ctypes.addressof(self._stage))

        def way_from(rank: int) -> _Way:
            at = self._base + stages + rank * _pages(way)
            return _Way(at, at + _LINE, at + 2 * _LINE, _BOX, looks, 0)

        self._behind = None if place.is_last else way_from(place.rank)
        self._before = None if place.is_first else way_from(place.rank - sharding.tp)

    def sum_(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        assert x.is_contiguous()
        if self.member.size > 1:
            self._native.ds_sum(ctypes.addressof(self._stage), x.data_ptr(), x.numel())
        return x

    def gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        if self.member.size == 1:
            return x
        x = x.contiguous()
        assert x.dtype == torch.float32
        assert x.shape[1] == widths[self.member.index]
        out = torch.empty((0 if self.member.index else len(x), sum(widths)), dtype=torch.float32)
        sizes = (_int * len(widths))(*widths)
        stage = ctypes.addressof(self._stage)
        self._native.ds_gather_parts(stage, x.data_ptr(), len(x), ctypes.addressof(sizes), out.data_ptr())
        return out

    def send(self, x: Tensor) -> None:
        """Returns when it lies in the shared memory; waits where four boxes (32 MiB) are not emptied yet."""
        assert self._behind is not None
        assert x.is_contiguous()
        self._native.ds_send(ctypes.addressof(self._behind), x.data_ptr(), x.nbytes)

    def receive(self, shape: tuple[int, int]) -> Tensor:
        assert self._before is not None
        x = torch.empty(shape, dtype=torch.float32)
        self._native.ds_receive(ctypes.addressof(self._before), x.data_ptr(), x.nbytes)
        return x

    def close(self) -> None:
        """The memory goes with the last rank that maps it."""
        os.close(self._file)


def _pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def _create(path: Path, size: int) -> int:
    """`size` bytes of zeros, which nobody need remove; the file beside `path` gets its name when it is whole."""
    memory = os.memfd_create("distserve-links", os.MFD_CLOEXEC)
    os.ftruncate(memory, size)
    unfinished = path.with_name(path.name + ".new")
    unfinished.write_text(f"/proc/{os.getpid()}/fd/{memory}")
    unfinished.replace(path)
    return memory


def _find(path: Path) -> int:
    while not path.exists():  # the first rank starts beside this one
        time.sleep(_PAUSE)
    return os.open(path.read_text(), os.O_RDWR | os.O_CLOEXEC)


def _address(function: Any) -> int:
    address = ctypes.cast(function, _pointer).value
    assert address is not None
    return address
