"""Linear layers over a flat token axis. A layer is built empty, filled by the loader (`weight`, `bias`, `part`), then
`pack()`ed once into the form its device multiplies fastest; after that its row-major weight is gone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distserve.engine import kernels
from distserve.engine.layers.activation import silu_mul


class Reordered:
    """A weight in the order that oneDNN likes on this processor, so that it is not reordered at every call."""

    gated = False

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self._bias = bias

    def multiply(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return product

    def logits(self, x: Tensor) -> Tensor:
        return self.multiply(x).float()


def _packed(weight: nn.Parameter, bias: Tensor | None, gated: bool) -> kernels.PackedWeight | None:
    """A bf16 CPU weight packed for our kernels; None where they do not multiply."""
    library = kernels.load() if weight.is_cpu and weight.dtype == torch.bfloat16 else None
    if library is None or not library.packs:
        return None
    return kernels.PackedWeight(library, weight.data.contiguous(), bias, gated)


def _reordered(weight: nn.Parameter, bias: Tensor | None) -> Reordered | None:
    """The next best: oneDNN, where it computes in bf16."""
    if not (weight.is_cpu and weight.dtype == torch.bfloat16 and torch._C._has_mkldnn):
        return None
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return Reordered(weight.data, bias) if supported else None


class Linear(nn.Module):
    """x [T, K] -> [T, N]; `weight` [N, K], `bias` [N] or None. `weight` is empty after `pack` where it was packed."""

    _gated = False

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
        self.packed: kernels.PackedWeight | Reordered | None = None

    def pack(self) -> None:
        """Call once, after loading and moving to the device."""
        bias = None if self.bias is None else self.bias.data
        self.packed = _packed(self.weight, bias, self._gated) or _reordered(self.weight, bias)
        if self.packed is not None:
            self.weight.data = torch.empty(0, dtype=self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        packed = self.packed
        if packed is not None:
            return packed.multiply(x if x.stride(1) == 1 else x.contiguous())
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
        return torch.split(self.weight.data, list(self.sizes))[index]

    def bias_part(self, index: int) -> Tensor:
        """Likewise of the bias."""
        assert self.bias is not None
        return torch.split(self.bias.data, list(self.sizes))[index]


class GatedLinear(MergedLinear):
    """Gate and up projections with the activation between them: x [T, K] -> silu(gate(x)) * up(x) [T, F]."""

    _gated = True

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
        product = super().forward(x)
        return product if self.packed is not None and self.packed.gated else silu_mul(product)


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
        self.packed: kernels.PackedWeight | None = None

    def pack(self) -> None:
        """Call once, after loading and moving to the device; pays where a tied head multiplies by this weight."""
        self.packed = _packed(self.weight, None, False)
        if self.packed is not None:
            self.weight.data = torch.empty(0, dtype=self.weight.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        if self.packed is not None:
            return self.packed.rows(ids.long().contiguous())
        return F.embedding(ids.long(), self.weight)
