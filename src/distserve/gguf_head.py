"""The head of a GGUF file (llama.cpp's format, version 2 and 3): metadata, and where each tensor lies. Knows no model,
no tokenizer and no quantization.

The `gguf` package's reader takes seconds over a vocabulary; here a string array costs a walk over its lengths, and
nothing is kept of it unless asked for. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distserve.errors import ModelError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """What the head says of one tensor."""

    shape: tuple[int, ...]  # row-major, as PyTorch writes it
    kind: int  # ggml's quantization type
    offset: int  # of its bytes in the file


@dataclass(frozen=True, slots=True)
class GGUFHead:
    """A mapped file and what its head says. `metadata` holds scalars and strings, and arrays where they were asked for
    (else None for each)."""

    data: mmap.mmap
    metadata: dict[str, Any]
    tensors: dict[str, TensorEntry]


def read_head(path: Path, arrays: bool = False) -> GGUFHead:
    """Raises `ModelError` where it is no GGUF file, or one that was cut short."""
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise ModelError(f"cannot read {path}: {error}") from error
    if len(data) >= 4 and data[:4] != b"GGUF":
        raise ModelError(f"{path} is not a GGUF file: it does not begin with 'GGUF'; convert or fetch it again")
    try:
        return _read(data, arrays)
    except (struct.error, ValueError, KeyError, OverflowError, MemoryError) as error:
        raise ModelError(
            f"{path} cannot be read as GGUF ({error}); it is truncated or damaged, fetch it again"
        ) from error


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


def _read(data: mmap.mmap, arrays: bool) -> GGUFHead:
    cursor = _Cursor(data)
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
    return GGUFHead(data, metadata, {name: TensorEntry(shape, kind, start + at) for name, shape, kind, at in infos})
