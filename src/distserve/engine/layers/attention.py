"""Attention over the paged KV cache: writes this step's keys and values, then attends causally over blocks.

Knows one layer's cache and the step's layout; knows no scheduler and no model.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from distserve.engine import kernels
from distserve.engine.kernels.bindings import DTYPES, Layer, Step
from distserve.engine.layers.rope import Rotary


@dataclass(slots=True)
class StepLayout:
    """Where the step's tokens belong ("attention metadata"): built once a step, passed to every layer."""

    positions: Tensor  # [T] int32, of each token in its sequence
    query_starts: Tensor  # [B+1] int32, row ranges of the sequences in the token axis
    context_lens: Tensor  # [B] int32, tokens of each sequence in the cache after this step's writes
    block_tables: Tensor  # [B, max_blocks] int32, padded with 0
    slots: Tensor  # [T] int64, block * block_size + offset: where each token's key and value go
    max_query_len: int
    max_context_len: int
    _native: Step | None = field(default=None, repr=False, compare=False)

    @classmethod
    def build(
        cls,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        block_size: int,
        device: torch.device | str = "cpu",
    ) -> StepLayout:
        """From plain lists, one entry a sequence: tokens computed in this step (the last of its context), tokens in the
        cache after it, blocks that hold them."""
        width = max((len(table) for table in block_tables), default=0)
        tables = torch.tensor([[*table, *([0] * (width - len(table)))] for table in block_tables], dtype=torch.int32)
        tables = tables.reshape(len(block_tables), width)
        lens = torch.tensor(query_lens, dtype=torch.int32)
        contexts = torch.tensor(context_lens, dtype=torch.int32)
        starts = torch.zeros(len(query_lens) + 1, dtype=torch.int32)
        torch.cumsum(lens, 0, out=starts[1:])
        rows = torch.repeat_interleave(torch.arange(len(query_lens)), lens.long())
        positions = torch.arange(int(starts[-1]), dtype=torch.int32) + (contexts - lens - starts[:-1])[rows]
        offsets = positions.long()
        slots = tables[rows, offsets // block_size].long() * block_size + offsets % block_size
        return cls(
            positions=positions.to(device, torch.int32),
            query_starts=starts.to(device),
            context_lens=contexts.to(device),
            block_tables=tables.to(device),
            slots=slots.to(device),
            max_query_len=max(query_lens, default=0),
            max_context_len=max(context_lens, default=0),
        )


def attention(
    q: Tensor, k: Tensor, v: Tensor, kv: Tensor, step: StepLayout, scale: float, window: int | None = None
) -> Tensor:
    """Writes `k`, `v` [T, KVH, D] into the cache and attends with `q` [T, H, D]; returns [T, H*D].

    `kv` [num_blocks, 2, KVH, block_size, D] is one layer of the pool, usually a strided view. `window`: each token sees
    at most that many tokens, itself included.
    """
    library = _kernels(q, kv)
    if library is None:
        return attention_reference(q, k, v, kv, step, scale, window)
    num_tokens, num_heads, dim = q.shape
    layer = describe_layer(kv, None, num_heads, scale, window)
    out = torch.empty((num_tokens, num_heads * dim), dtype=q.dtype)
    q, k, v = (x if x.stride(2) == 1 and x.stride(1) == dim else x.contiguous() for x in (q, k, v))
    parts = (argument for x in (q, k, v) for argument in (x.data_ptr(), x.stride(0)))
    library.attention(layer, describe_step(step), *parts, out.data_ptr())
    return out


def rope_attention(
    qkv: Tensor,
    rope: Rotary,
    kv: Tensor,
    step: StepLayout,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Rotates queries and keys of `qkv` [T, (H + 2 KVH) D], then as `attention`. May overwrite `qkv`."""
    library = _kernels(qkv, kv)
    if library is None:
        return rope_attention_reference(qkv, rope, kv, step, num_heads, num_kv_heads, scale, window)
    layer = describe_layer(kv, rope, num_heads, scale, window)
    size, stride = kv.shape[4] * qkv.element_size(), qkv.stride(0)
    q = qkv.data_ptr()
    k = q + num_heads * size
    v = k + num_kv_heads * size
    out = torch.empty((qkv.shape[0], num_heads * kv.shape[4]), dtype=qkv.dtype)
    library.attention(layer, describe_step(step), q, stride, k, stride, v, stride, out.data_ptr())
    return out


_layers: dict[tuple[object, ...], tuple[Layer, int]] = {}


def _kernels(x: Tensor, kv: Tensor) -> kernels.Kernels | None:
    """The kernels, if they compute on such tensors."""
    fits = x.is_cpu and x.dtype in DTYPES and x.dtype is kv.dtype and x.stride(-1) == 1
    return kernels.load() if fits else None


def describe_layer(kv: Tensor, rope: Rotary | None, num_heads: int, scale: float, window: int | None) -> int:
    """The address of the kernels' description of one layer; made once for a cache that stays where it is."""
    strides = kv.stride()
    key = (kv.data_ptr(), kv.shape, strides, kv.dtype, rope, num_heads, scale, window)
    found = _layers.get(key)
    if found is not None:
        return found[1]
    num_kv_heads, block_size, dim = kv.shape[2:]
    assert strides[3:] == (dim, 1), "a head's tokens must lie side by side"
    assert num_heads % num_kv_heads == 0
    assert block_size % 4 == 0, "plain attention unpacks four keys at a time"
    tables = (None, None) if rope is None else (rope.cos.data_ptr(), rope.sin.data_ptr())
    assert rope is None or 2 * rope.cos.shape[1] == dim
    shape = (num_heads, num_kv_heads, dim, block_size, window or 0, DTYPES[kv.dtype])
    layer = Layer(kv.data_ptr(), strides[0], strides[1], strides[2], *shape, *tables, scale)
    _layers[key] = (layer, ctypes.addressof(layer))
    return _layers[key][1]


def describe_step(step: StepLayout) -> int:
    """The address of the kernels' view of the step, made by the first layer that asks."""
    if step._native is None:
        tensors = (step.query_starts, step.context_lens, step.block_tables, step.positions, step.slots)
        assert all(x.is_contiguous() for x in tensors)
        batch, width = step.block_tables.shape
        step._native = Step(*(x.data_ptr() for x in tensors), step.positions.shape[0], batch, width)
    return ctypes.addressof(step._native)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, kv: Tensor, step: StepLayout, scale: float, window: int | None = None
) -> Tensor:
    """`attention` in plain torch."""
    _write(k, v, kv, step)
    return _attend(q, kv, step, scale, window)


def rope_attention_reference(
    qkv: Tensor,
    rope: Rotary,
    kv: Tensor,
    step: StepLayout,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """`rope_attention` in plain torch."""
    heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, -1)
    q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    q, k = rope.rotate(q, step.positions), rope.rotate(k, step.positions)
    return attention_reference(q, k, v, kv, step, scale, window)


def _write(k: Tensor, v: Tensor, kv: Tensor, step: StepLayout) -> None:
    block_size = kv.shape[3]
    blocks, offsets = step.slots // block_size, step.slots % block_size
    kv[blocks, 0, :, offsets] = k
    kv[blocks, 1, :, offsets] = v


def _attend(q: Tensor, kv: Tensor, step: StepLayout, scale: float, window: int | None) -> Tensor:
    """One padded batch where every sequence has one query, else sequence by sequence."""
    num_tokens, num_heads, dim = q.shape
    block_size = kv.shape[3]
    out = torch.empty(num_tokens, num_heads, dim, dtype=q.dtype, device=q.device)
    if step.max_query_len == 1:
        out = _attend_rows(q[:, :, None], kv[step.block_tables.long()], step.positions[:, None], scale, window)
        return out.reshape(num_tokens, num_heads * dim)
    starts, contexts = step.query_starts.tolist(), step.context_lens.tolist()
    for i, context in enumerate(contexts):
        first, last = starts[i], starts[i + 1]
        if first == last:
            continue
        pages = kv[step.block_tables[i, : -(-context // block_size)].long()][None]
        rows = q[first:last].transpose(0, 1)[None]
        out[first:last] = _attend_rows(rows, pages, step.positions[None, first:last], scale, window)[0].transpose(0, 1)
    return out.view(num_tokens, num_heads * dim)


def _attend_rows(q: Tensor, pages: Tensor, positions: Tensor, scale: float, window: int | None) -> Tensor:
    """`q` [B, H, R, D] at `positions` [B, R] over `pages` [B, blocks, 2, KVH, block_size, D] -> [B, H, R, D]."""
    batch, num_blocks, _, num_kv_heads, block_size, dim = pages.shape
    keys, values = pages.permute(2, 0, 3, 1, 4, 5).reshape(2, batch, num_kv_heads, num_blocks * block_size, dim)
    index = torch.arange(num_blocks * block_size, device=q.device)
    seen = index <= positions[..., None]
    # slots that no query sees may hold anything, NaN included, and 0 * NaN is NaN
    unseen = ~seen.any(1)[:, None, :, None]
    keys, values = keys.masked_fill(unseen, 0), values.masked_fill(unseen, 0)
    if window is not None:
        seen &= index > positions[..., None] - window
    return F.scaled_dot_product_attention(
        q, keys, values, attn_mask=seen[:, None], scale=scale, enable_gqa=q.shape[1] != num_kv_heads
    )
