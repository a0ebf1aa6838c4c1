"""The kernels as Python objects: loads the library once per process and wraps its calls over tensors. ctypes releases
the interpreter lock during a call.

Every function takes CPU tensors that the caller has checked: formats, contiguity and shapes are asserted in layers/.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import mmap
from typing import Any, Literal

import torch
from torch import Tensor

from distserve import machine
from distserve.engine.kernels.build import build
from distserve.native import BuildError

log = logging.getLogger(__name__)

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_SUFFIX = {torch.float32: "_f32", torch.bfloat16: "_bf16"}
Unit = Literal["vectors", "tiles"]
_UNITS: tuple[Unit | None, ...] = (None, "vectors", "tiles")  # by the numbers that ds_init takes and gives
_MOST: dict[machine.Kernels, Unit | None] = {"auto": "tiles", "vectors": "vectors", "generic": None}
_MODES = {"bfloat16": 0, "float32": 1, "gated": 2}
_ARENA = 32 << 20
_HUGE_PAGE = 2 << 20

_pointer, _int, _float, _double = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_double


class _Packed(ctypes.Structure):
    _fields_ = [("weight", _pointer), ("bias", _pointer), ("num_outputs", _int), ("num_inputs", _int), ("gated", _int)]


class Step(ctypes.Structure):
    """`Step` of attention.h; the tensors it points to must outlive it."""

    _fields_ = [
        *((name, _pointer) for name in ("query_starts", "context_lens", "block_tables", "positions", "slots")),
        *((name, _int) for name in ("num_tokens", "num_sequences", "max_blocks")),
    ]


class Layer(ctypes.Structure):
    """`Layer` of attention.h."""

    _fields_ = [
        ("kv", _pointer),
        *((name, _int) for name in ("block_stride", "value_offset", "head_stride")),
        *((name, _int) for name in ("num_heads", "num_kv_heads", "head_dim", "block_size", "window", "dtype")),
        *((name, _pointer) for name in ("cosines", "sines")),
        ("scale", _double),
    ]


class Block(ctypes.Structure):
    """`Block` of stack.h: addresses of two norms' weights, of four packed weights and of a `Layer`."""

    _fields_ = [
        (name, _pointer) for name in ("attention_norm", "mlp_norm", "qkv", "out", "gate_up", "down", "attention")
    ]


# `Sum` of stack.h: (context, values, count) -> 0, or anything else where it failed.
Sum = ctypes.CFUNCTYPE(_int, _pointer, _pointer, _int)


class StackOfBlocks(ctypes.Structure):
    """`Stack` of stack.h."""

    _fields_ = [
        *(("blocks", _pointer), ("num_blocks", _int), ("width", _int), ("eps", _double)),
        *(("sum", Sum), ("context", _pointer)),
    ]


class Kernels:
    """The loaded library. `unit`: what multiplies, up to `most`: "tiles" (AMX; attention too), "vectors" (AVX512-BF16)
    or None, where torch does. `packs`: weights are to be packed, because these kernels multiply."""

    def __init__(self, library: ctypes.CDLL, most: Unit | None = "tiles") -> None:
        def function(name: str, *arguments: Any, result: Any = None) -> Any:
            found = getattr(library, name)
            found.argtypes, found.restype = arguments, result
            return found

        self.unit: Unit | None = _UNITS[function("ds_init", _int, result=_int)(_UNITS.index(most))]
        self.has_threads = bool(function("ds_has_threads", result=_int)())
        self._set_num_threads = function("ds_set_num_threads", _int)
        norm = (_pointer, _pointer, _pointer, _pointer, _int, _int, _float)
        self._norm = {dtype: function("ds_rms_norm" + suffix, *norm) for dtype, suffix in _SUFFIX.items()}
        silu = (_pointer, _pointer, _int, _int)
        self._silu = {dtype: function("ds_silu_mul" + suffix, *silu) for dtype, suffix in _SUFFIX.items()}
        part = (_pointer, _int)
        self.attention = function("ds_attention", _pointer, _pointer, *part, *part, *part, _pointer)
        self.pack = function("ds_pack", _pointer, _pointer, _pointer)
        self.gather = function("ds_gather", _pointer, _pointer, _int, _pointer, result=_int)
        if self.packs:
            self.linear = function("ds_linear", _pointer, _pointer, _int, _int, _pointer, _int, _int)
            self.stack = function("ds_stack", *(_pointer,) * 4, _int, _pointer, _pointer, result=_int)
            self.stack_bytes = function("ds_stack_bytes", _pointer, _int, result=_int)

    @property
    def packs(self) -> bool:
        return self.unit is not None

    def set_num_threads(self, count: int) -> None:
        """Threads of every later call. Results do not depend on it."""
        self._set_num_threads(count)

    def rms_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """Norm of `x`, or of `residual += x` (fp32)."""
        out = torch.empty_like(x)
        added = None if residual is None else residual.data_ptr()
        rows, width = x.shape
        self._norm[x.dtype](x.data_ptr(), added, weight.data_ptr(), out.data_ptr(), rows, width, eps)
        return out

    def silu_mul(self, x: Tensor) -> Tensor:
        rows, width = x.shape[0], x.shape[1] // 2
        out = torch.empty((rows, width), dtype=x.dtype)
        self._silu[x.dtype](x.data_ptr(), out.data_ptr(), rows, width)
        return out


class PackedWeight:
    """A bf16 weight [N, K] in the order in which it is multiplied, with its bias. Needs `Kernels.packs`."""

    def __init__(self, kernels: Kernels, weight: Tensor, bias: Tensor | None = None, gated: bool = False) -> None:
        assert kernels.packs
        assert weight.dtype == torch.bfloat16
        assert weight.is_contiguous()
        num_outputs, num_inputs = weight.shape
        assert num_outputs % 2 == 0 or not gated
        units = -(-num_outputs // 32) if not gated else -(-num_outputs // 2 // 16)
        self._memory = _arena.take(units * -(-num_inputs // 32) * 2048)
        self._bias = bias
        at_bias = None if bias is None else bias.data_ptr()
        self._struct = _Packed(self._memory.data_ptr(), at_bias, num_outputs, num_inputs, int(gated))
        self.address = ctypes.addressof(self._struct)
        kernels.pack(self.address, weight.data_ptr(), self._memory.data_ptr())
        self._linear, self._gather = kernels.linear, kernels.gather
        self._inputs = num_inputs
        self.gated = gated
        self._width = num_outputs // 2 if gated else num_outputs
        self._mode = _MODES["gated" if gated else "bfloat16"]

    def multiply(self, x: Tensor) -> Tensor:
        """x [T, K] bf16, rows contiguous -> [T, N] bf16 (gated: silu(gate) * up [T, N/2])."""
        rows = x.shape[0]
        out = torch.empty((rows, self._width), dtype=torch.bfloat16)
        self._linear(self.address, x.data_ptr(), x.stride(0), rows, out.data_ptr(), self._width, self._mode)
        return out

    def logits(self, x: Tensor) -> Tensor:
        """x [R, K] bf16 -> [R, N] fp32, not rounded to bf16 on the way."""
        rows = x.shape[0]
        out = torch.empty((rows, self._width), dtype=torch.float32)
        self._linear(self.address, x.data_ptr(), x.stride(0), rows, out.data_ptr(), self._width, _MODES["float32"])
        return out

    def rows(self, ids: Tensor) -> Tensor:
        """Rows `ids` [T] int64 of the unpacked weight. Raises IndexError."""
        out = torch.empty((ids.shape[0], self._inputs), dtype=torch.bfloat16)
        if self._gather(self.address, ids.data_ptr(), ids.shape[0], out.data_ptr()):
            raise IndexError(f"a token id is outside the vocabulary of {self._width}")
        return out


class _Arena:
    """Packed weights side by side in huge pages: fewer page walks, one straight stream. Memory goes back when the last
    weight of a chunk does."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> Tensor:
        """`size` bytes, aligned to 64; uninitialised."""
        size = -(-max(size, 64) // 64) * 64
        if size > self._chunk.numel():
            self._chunk = huge_pages(max(size, _ARENA))
        taken, self._chunk = self._chunk[:size], self._chunk[size:]
        return taken


def huge_pages(size: int) -> Tensor:
    """At least `size` bytes in huge pages where the system has them; a page takes memory when it is first written."""
    whole = -(-size // _HUGE_PAGE) * _HUGE_PAGE
    memory = mmap.mmap(-1, whole + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    pages = torch.frombuffer(memory, dtype=torch.uint8)
    return pages[-pages.data_ptr() % _HUGE_PAGE :]


_arena = _Arena()


@functools.cache
def load() -> Kernels | None:
    """The kernels of this process, built if need be; None where switched off or not buildable (said once)."""
    dial = machine.kernels()
    if dial == "off":
        return None
    try:
        library = ctypes.CDLL(str(build()))
    except (BuildError, OSError) as error:
        log.warning("CPU kernels are unavailable, plain torch computes instead (slower): %s", error)
        return None
    return Kernels(library, _MOST[dial])


def set_num_threads(count: int) -> None:
    """Threads of the kernels and of torch in this process."""
    torch.set_num_threads(count)
    kernels = load()
    if kernels is not None:
        kernels.set_num_threads(count)
