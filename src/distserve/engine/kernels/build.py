"""Which files the CPU kernels are made of, and with which flags; how a library comes to be is `native`'s business."""

from __future__ import annotations

from pathlib import Path

from distserve import native

SOURCES = (
    "kernels.c",
    "common.h",
    "linear.h",
    "linear_amx.h",
    "linear_vectors.h",
    "attention.h",
    "attention_amx.h",
    "attention_columns.h",
    "attention_rows.h",
    "attention_plain.h",
    "attention_vectors.h",
    "pointwise.h",
    "stack.h",
)


def build() -> Path:
    """The compiled kernels. Raises `native.BuildError`."""
    return native.build(Path(__file__).parent, SOURCES, native.THREADED)
