"""Linear layers over a flat token axis. A layer is built empty, filled by the loader (`weight`, `bias`, `part`), then
`pack()`ed once into the form its device multiplies fastest; after that its row-major weight is gone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distserve.engine.layers.activation import silu_mul


class Linear(nn.Module):
    """x [T, K] -> [T, N]; `weight` [N, K], `bias` [N] or None. `weight` is empty after `pack`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        empty = torch.empty(out_features, in_features, dtype=dtype, device=device)
        self.weight = nn.Parameter(empty, requires_grad=False)
        self.bias = (
            nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device), requires_grad=False) if bias else None
        )

    def pack(self) -> None:
        """Call once, after loading and moving to the device."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class MergedLinear(Linear):
    """Several linear layers over one input, stacked in one weight (q, k, v; gate, up). `sizes`: rows of each part."""

    def __init__(
        self,
        in_features: int,
        sizes: Sequence[int],
        bias: bool = False,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(in_features, sum(sizes), bias, dtype=dtype, device=device)
        self.sizes = tuple(sizes)

    def part(self, index: int) -> Tensor:
        """The rows [sizes[index], K] of one part, a view to load into. Only before `pack`."""
        return torch.split(self.weight.data, self.sizes)[index]

    def bias_part(self, index: int) -> Tensor:
        """Likewise of the bias."""
        assert self.bias is not None
        return torch.split(self.bias.data, self.sizes)[index]


class GatedLinear(MergedLinear):
    """Gate and up projections with the activation between them: x [T, K] -> silu(gate(x)) * up(x) [T, F]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(in_features, (out_features, out_features), bias, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return silu_mul(super().forward(x))


class Embedding(nn.Module):
    """ids [T] -> rows of `weight` [V, C], as [T, C]."""

    def __init__(
        self,
        num_embeddings: int,
        dim: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_embeddings, dim, dtype=dtype, device=device), requires_grad=False)

    def pack(self) -> None:
        """Call once, after loading and moving to the device."""

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids.long(), self.weight)


class Head(nn.Module):
    """The language model's head: x [R, C] -> fp32 logits [R, V]. Tied: it shares its embedding's one weight."""

    def __init__(
        self,
        in_features: int,
        num_embeddings: int,
        *,
        tied: Embedding | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.out = None if tied else Linear(in_features, num_embeddings, dtype=dtype, device=device)
        self._tied = (tied,)  # in a tuple, so that the embedding stays its owner's submodule alone

    def pack(self) -> None:
        """Call once, after loading and moving to the device."""
        if self.out is not None:
            self.out.pack()

    def logits(self, x: Tensor) -> Tensor:
        tied = self._tied[0]
        if tied is not None:
            return F.linear(x, tied.weight).float()
        assert self.out is not None
        return self.out(x).float()  # type: ignore[no-any-return]

    forward = logits
