"""A model's blocks in one call of the kernels: what lies between kernels costs more than it looks, for each of them
throws Python's code and data out of the caches. Knows no model: a family says which of its modules make a block.

Only for bf16 on a CPU where our own kernels multiply, and not another way to compute: `build` returns None elsewhere,
and the modules, called one by one, are the reference.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distserve.engine import kernels
from distserve.engine.collectives import ALONE, Links
from distserve.engine.kernels.bindings import Block, StackOfBlocks, Sum, huge_pages
from distserve.engine.layers.attention import StepLayout, describe_layer, describe_step
from distserve.engine.layers.linear import Linear
from distserve.engine.layers.rope import Rotary


@dataclass(frozen=True, slots=True)
class BlockParts:
    """x += out(attention(qkv(norm(x)))); x += down(gate_up(norm(x)))."""

    attention_norm: Tensor  # [C]
    qkv: Linear
    out: Linear
    mlp_norm: Tensor  # [C]
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class AttentionShape:
    num_heads: int
    scale: float
    window: int | None


class Stack:
    """The blocks of one rank. Not thread-safe: its scratch memory is its own."""

    def __init__(
        self, library: kernels.Kernels, parts: Sequence[BlockParts], shape: AttentionShape, eps: float, links: Links
    ) -> None:
        self._library = library
        self._links = links
        self._parts = parts
        self._shape = shape
        self._eps = eps
        self._made_for: tuple[object, ...] = ()
        self._failure: Exception | None = None
        self._scratch = torch.empty(0, dtype=torch.uint8)

    @classmethod
    def build(
        cls, parts: Sequence[BlockParts], shape: AttentionShape, eps: float, links: Links = ALONE
    ) -> Stack | None:
        """None where some part is not in the kernels' form."""
        linears = [linear for p in parts for linear in (p.qkv, p.out, p.gate_up, p.down)]
        packed = all(isinstance(linear.packed, kernels.PackedWeight) for linear in linears)
        library = kernels.load()
        return cls(library, parts, shape, eps, links) if library is not None and library.packs and packed else None

    def forward(
        self, residual: Tensor, rope: Rotary, kv: Sequence[Tensor], step: StepLayout, rows: Tensor | None
    ) -> Tensor:
        """The residual stream [T, C] fp32, which is overwritten -> the same after the blocks, of the token `rows` [R]
        (None: of all)."""
        assert residual.dtype == torch.float32
        assert residual.is_contiguous()
        at = self._describe(rope, kv, residual.shape[1])
        size = self._library.stack_bytes(at, len(residual))
        if size > self._scratch.numel():
            self._scratch = huge_pages(size)
        memory, layout = self._scratch.data_ptr(), describe_step(step)
        if rows is None:
            self._call(at, layout, residual.data_ptr(), None, 0, None, memory)
            return residual
        assert rows.dtype == torch.int64
        assert rows.is_contiguous()
        assert len(rows) <= len(residual)
        finished = torch.empty((len(rows), residual.shape[1]), dtype=torch.float32)
        pointers = (residual.data_ptr(), rows.data_ptr())
        self._call(at, layout, *pointers, len(rows), finished.data_ptr(), memory)
        return finished

    def _call(self, *arguments: int | None) -> None:
        if self._library.stack(*arguments):
            failure, self._failure = self._failure, None
            raise failure or RuntimeError("the sum over the ranks of a stage failed")

    def _describe(self, rope: Rotary, kv: Sequence[Tensor], width: int) -> int:
        """The address of the kernels' description of the blocks over this cache."""
        key = (rope, kv[0].data_ptr(), kv[-1].data_ptr(), kv[0].shape, kv[0].stride())
        if key != self._made_for:
            assert len(kv) == len(self._parts)
            assert all(cache.dtype == torch.bfloat16 and cache.is_cpu for cache in kv)
            blocks = [self._block(part, rope, cache) for part, cache in zip(self._parts, kv, strict=True)]
            self._blocks = (Block * len(blocks))(*blocks)
            self._summer = self._make_summer()
            address, context = self._summer
            self._stack = StackOfBlocks(ctypes.addressof(self._blocks), len(blocks), width, self._eps, address, context)
            self._made_for = key
        return ctypes.addressof(self._stack)

    def _make_summer(self) -> tuple[object, int | None]:
        """What the kernels call to sum a product over the ranks: a function and its first argument."""
        if self._links.member.size == 1:
            return Sum(), None
        if self._links.summer is not None:
            return Sum(self._links.summer[0]), self._links.summer[1]

        def add(_: int, values: int, count: int) -> int:
            try:
                self._links.sum_(torch.frombuffer((ctypes.c_float * count).from_address(values), dtype=torch.float32))
            except Exception as error:  # noqa: BLE001  (through C no exception can pass: it is raised behind the call)
                self._failure = error
                return 1
            return 0

        return Sum(add), None

    def _block(self, part: BlockParts, rope: Rotary, cache: Tensor) -> Block:
        shape, norms = self._shape, (part.attention_norm, part.mlp_norm)
        assert all(norm.dtype == torch.bfloat16 and norm.is_contiguous() for norm in norms)
        linears = [linear.packed for linear in (part.qkv, part.out, part.gate_up, part.down)]
        weights = [packed.address for packed in linears if isinstance(packed, kernels.PackedWeight)]
        layer = describe_layer(cache, rope, shape.num_heads, shape.scale, shape.window)
        return Block(*(norm.data_ptr() for norm in norms), *weights, layer)
