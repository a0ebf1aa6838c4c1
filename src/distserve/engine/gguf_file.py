"""The tensors of a GGUF file, dequantized piece by piece (by the `gguf` package). Knows no model."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distserve.errors import ModelError
from distserve.gguf_head import read_head

_CHUNK = 1 << 18  # values dequantized at a time: stays in cache, and bounds the memory that loading takes


@dataclass(frozen=True, slots=True)
class TensorInfo:
    shape: tuple[int, ...]  # row-major, as PyTorch writes it
    kind: int  # ggml's quantization type
    offset: int  # of its bytes in the file
    size: int  # bytes


class GGUFFile:
    """One file, mapped. `metadata` holds scalars and strings, and arrays where `arrays` is set (else None for each)."""

    def __init__(self, path: Path, arrays: bool = False) -> None:
        self.path = path
        head = read_head(path, arrays)
        self._map, self.metadata = head.data, head.metadata
        try:
            self.tensors = {
                name: TensorInfo(entry.shape, entry.kind, entry.offset, _size(entry.shape, entry.kind))
                for name, entry in head.tensors.items()
            }
        except (ValueError, KeyError, OverflowError) as error:
            raise ModelError(f"{path} has a tensor of an unknown kind ({error}); fetch it again") from error
        end = max((t.offset + t.size for t in self.tensors.values()), default=0)
        if end > len(self._map):
            raise ModelError(f"{path} is truncated: {len(self._map)} bytes of {end}; fetch it again")

    def read(self, name: str, rows: NDArray[np.intp]) -> Iterator[NDArray[np.float32]]:
        """Rows `rows` of a tensor as fp32, a piece [n, columns] (vectors: [n]) at a time."""
        import gguf

        info = self.tensors[name]
        kind = gguf.GGMLQuantizationType(info.kind)
        raw = np.frombuffer(self._map, np.uint8, info.size, info.offset)
        if len(info.shape) == 1:
            yield gguf.dequantize(raw, kind).astype(np.float32, copy=False)[rows]
            return
        table = raw.reshape(info.shape[0], -1)
        step = max(1, _CHUNK // info.shape[1])
        for first in range(0, len(rows), step):
            piece = table[rows[first : first + step]]
            try:  # as one long row: `dequantize` goes through rows sixteen at a time, in Python
                values = gguf.dequantize(piece.reshape(1, -1), kind)
            except NotImplementedError as error:
                raise ModelError(f"{self.path}: {name} is quantized as {kind.name}, which is not supported") from error
            yield values.astype(np.float32, copy=False).reshape(len(piece), -1)

    def forget(self) -> None:
        """What was read of a mapped file counts as this process's memory until it says that it is done with it."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def vector(self, name: str) -> list[float] | None:
        """The values of a vector; None where the file has no such tensor."""
        if name not in self.tensors:
            return None
        (values,) = self.read(name, np.arange(self.tensors[name].shape[0]))
        return [float(value) for value in values]


def _size(shape: tuple[int, ...], kind: int) -> int:
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    return int(np.prod(shape, dtype=np.int64)) // block * size
