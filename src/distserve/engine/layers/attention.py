"""Attention over the paged KV cache: writes this step's keys and values, then attends causally over blocks.

Knows one layer's cache and the step's layout; knows no scheduler and no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

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
    _write(k, v, kv, step)
    return _attend(q, kv, step, scale, window)


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
    heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, -1)
    q, k, v = torch.split(heads, (num_heads, num_kv_heads, num_kv_heads), dim=1)
    return attention(rope.rotate(q, step.positions), rope.rotate(k, step.positions), v, kv, step, scale, window)


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
