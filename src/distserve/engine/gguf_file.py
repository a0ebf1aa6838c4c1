"""Reads GGUF files (llama.cpp's format, version 2 and 3): metadata, and where each tensor's bytes lie. Knows no model.

The `gguf` package dequantizes; its reader is not used because it takes 2.5 s over a vocabulary that an instance does
not need. Here a string array costs a walk over its lengths, and nothing at all is kept of it unless asked for.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distserve.errors import ModelError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_CHUNK = 1 << 18  # values dequantized at a time: stays in cache, and bounds the memory that loading takes


@dataclass(frozen=True, slots=True)
class TensorInfo:
    shape: tuple[int, ...]  # row-major, as PyTorch writes it
    kind: int  # ggml's quantization type
    offset: int  # of its bytes in the file
    size: int  # bytes


class _Cursor:
    """A position in the header. Raises `struct.error` or `ValueError` past the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        size = self.scalar("Q")
        if size > len(self.data) - self.at:
            raise ValueError("a string reaches beyond the end")
        self.at += size
        return self.data[self.at - size : self.at].decode("utf-8", "replace")

    def value(self, kind: int, keep_arrays: bool) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        item, count = self.scalar("I"), self.scalar("Q")
        if item in (_STRING, _ARRAY):
            if keep_arrays or item == _ARRAY:
                return [self.value(item, keep_arrays) for _ in range(count)]
            return self._skip_strings(count)
        code = f"{count}{_SCALARS[item]}"
        values = list(struct.unpack_from("<" + code, self.data, self.at)) if keep_arrays else None
        self.at += struct.calcsize("<" + code)
        return values

    def _skip_strings(self, count: int) -> None:
        data, at, unpack = self.data, self.at, struct.Struct("<Q").unpack_from
        for _ in range(count):
            at += 8 + unpack(data, at)[0]
        self.at = at


class GGUFFile:
    """One file, mapped. `metadata` holds scalars and strings, and arrays where `arrays` is set (else None for each)."""

    def __init__(self, path: Path, arrays: bool = False) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise ModelError(f"cannot read {path}: {error}") from error
        try:
            self.metadata, self.tensors = _read_header(self._map, arrays)
        except (struct.error, ValueError, KeyError, OverflowError, MemoryError) as error:
            raise ModelError(
                f"{path} is not a readable GGUF file ({error}); it is truncated, fetch it again"
            ) from error
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

    def vector(self, name: str) -> list[float] | None:
        """The values of a vector; None where the file has no such tensor."""
        if name not in self.tensors:
            return None
        (values,) = self.read(name, np.arange(self.tensors[name].shape[0]))
        return [float(value) for value in values]


def _read_header(data: mmap.mmap, arrays: bool) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    cursor = _Cursor(data)
    if data[:4] != b"GGUF":
        raise ValueError("it does not begin with 'GGUF'")
    cursor.at = 4
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise ValueError(f"version {version}; versions 2 and 3 are supported")
    num_tensors, num_entries = cursor.scalar("Q"), cursor.scalar("Q")
    metadata = {}
    for _ in range(num_entries):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("I"), arrays)
    infos = []
    for _ in range(num_tensors):
        name = cursor.string()
        shape = tuple(cursor.scalar("Q") for _ in range(cursor.scalar("I")))[::-1]
        infos.append((name, shape, cursor.scalar("I"), cursor.scalar("Q")))
    alignment = metadata.get("general.alignment", 32)
    start = -(-cursor.at // alignment) * alignment
    return metadata, {n: TensorInfo(s, kind, start + at, _size(s, kind)) for n, s, kind, at in infos}


def _size(shape: tuple[int, ...], kind: int) -> int:
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    return int(np.prod(shape, dtype=np.int64)) // block * size
