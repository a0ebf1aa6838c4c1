"""What layers compute, said again in fp64 and as plainly as possible, and how far a result is from it."""

from __future__ import annotations

import torch
from torch import Tensor

from distserve.engine.layers import Rotary, StepLayout

EPSILON = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}


def distance(got: Tensor, wanted: Tensor) -> float:
    """|got - wanted| over |wanted|, of whole tensors; NaN anywhere makes it NaN."""
    if not wanted.numel():
        return 0.0
    return float((got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))


def attention(
    q: Tensor, keys: Tensor, values: Tensor, positions: list[int], scale: float, window: int | None
) -> Tensor:
    """`q` [R, H, D] at `positions` over one sequence's `keys`, `values` [N, KVH, D] -> [R, H, D] in fp64."""
    group = q.shape[1] // keys.shape[1]
    wide_keys = keys.double().repeat_interleave(group, dim=1)
    wide_values = values.double().repeat_interleave(group, dim=1)
    out = torch.empty(q.shape, dtype=torch.float64)
    for row, position in enumerate(positions):
        first = 0 if window is None else max(0, position - window + 1)
        seen = slice(first, position + 1)
        scores = torch.einsum("hd,nhd->hn", q[row].double(), wide_keys[seen]) * scale
        out[row] = torch.einsum("hn,nhd->hd", scores.softmax(-1), wide_values[seen])
    return out


class Paged:
    """Some sequences in a paged cache of which every unused slot is NaN; `layer` is a strided view, as in a pool."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, contexts: list[int], seed: int = 0) -> None:
        self.num_kv_heads, self.dim, self.block_size = shape
        generator = torch.Generator().manual_seed(seed)
        needed = [-(-n // self.block_size) for n in contexts]
        order = (torch.randperm(sum(needed) + 3, generator=generator) + 1).tolist()
        self.tables = [[order.pop() for _ in range(n)] for n in needed]
        pool = torch.full((sum(needed) + 4, 2, 2, self.num_kv_heads, self.block_size, self.dim), float("nan"))
        self.layer = pool.to(dtype)[:, 1]
        self.contexts = contexts

    def step(self, query_lens: list[int]) -> StepLayout:
        return StepLayout.build(query_lens, self.contexts, self.tables, self.block_size)

    def slot(self, sequence: int, position: int) -> Tensor:
        """[2, KVH, D]: the key and value at a position, a view."""
        block = self.tables[sequence][position // self.block_size]
        return self.layer[block, :, :, position % self.block_size]

    def history(self, query_lens: list[int], seed: int = 1) -> list[Tensor]:
        """Fills what comes before the step, returns it: per sequence [N, 2, KVH, D]."""
        generator = torch.Generator().manual_seed(seed)
        found = []
        for i, (context, count) in enumerate(zip(self.contexts, query_lens, strict=True)):
            shape = (context - count, 2, self.num_kv_heads, self.dim)
            past = torch.randn(shape, generator=generator).to(self.layer.dtype)
            for position in range(context - count):
                self.slot(i, position).copy_(past[position])
            found.append(past)
        return found


def rotated(rope: Rotary, x: Tensor, positions: list[int]) -> Tensor:
    """`x` [R, H, D] turned in fp64."""
    cos, sin = rope.cos[positions, None].double(), rope.sin[positions, None].double()
    first, second = x.double().chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
