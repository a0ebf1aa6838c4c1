"""Layers that the ranks of a stage compute together: each holds a part, and the links bring the results together. An
instance's only rank computes the same without a sum.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distserve.engine.collectives import ALONE, Links
from distserve.engine.layers.linear import Embedding, Linear
from distserve.engine.parallel import vocabulary_part


class RowLinear(Linear):
    """x [T, K], this rank's input features -> [T, N], the sum over the ranks. One of them adds the bias."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        links: Links = ALONE,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias and links.member.index == 0, dtype=dtype, device=device)
        self.links = links

    def forward(self, x: Tensor) -> Tensor:
        if self.links.member.size == 1:
            return super().forward(x)
        return self.links.sum_(self.partial(x)).to(x.dtype)

    def partial(self, x: Tensor) -> Tensor:
        """This rank's term of the sum, [T, N] in fp32. It is not rounded before where the device's matrix product can
        give fp32 (our kernels, CUDA); else once, to the weight's dtype."""
        if self.packed is not None:
            return self.packed.logits(x if x.stride(1) == 1 else x.contiguous())
        if x.is_cuda and x.dtype != torch.float32:
            product = torch.mm(x, self.weight.T, out_dtype=torch.float32)
            return product if self.bias is None else product + self.bias
        return F.linear(x, self.weight, self.bias).float()


class VocabularyEmbedding(Embedding):
    """ids [T] -> fp32 [T, C]. Each rank holds some tokens' rows; the others add zeros to them."""

    def __init__(
        self,
        num_embeddings: int,
        dim: int,
        *,
        links: Links = ALONE,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        tokens = vocabulary_part(num_embeddings, links.member)
        super().__init__(len(tokens), dim, dtype=dtype, device=device)
        self.tokens, self.links = tokens, links

    def forward(self, ids: Tensor) -> Tensor:
        if self.links.member.size == 1:
            return super().forward(ids).float()
        own = ids.long() - self.tokens.start
        elsewhere = (own < 0) | (own >= len(self.tokens))
        rows = super().forward(own.masked_fill_(elsewhere, 0)).float()
        return self.links.sum_(rows.masked_fill_(elsewhere[:, None], 0))


class Head(nn.Module):
    """The language model's head: x [R, C] -> fp32 logits [R, V] at the first rank, [0, V] at the others. Tied: it
    shares its embedding's one weight."""

    def __init__(
        self,
        in_features: int,
        num_embeddings: int,
        *,
        tied: VocabularyEmbedding | None = None,
        links: Links = ALONE,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        sizes = [len(vocabulary_part(num_embeddings, member)) for member in links.member.all()]
        own = sizes[links.member.index]
        self.out = Linear(in_features, own, dtype=dtype, device=device) if tied is None else None
        self._owner = (tied or self.out,)  # in a tuple, so that the embedding stays its owner's submodule alone
        self.links, self.sizes = links, sizes

    def logits(self, x: Tensor) -> Tensor:
        owner = self._owner[0]
        assert owner is not None
        if owner.packed is not None:
            own = owner.packed.logits(x if x.stride(1) == 1 else x.contiguous())
        else:
            own = F.linear(x, owner.weight).float()
        return self.links.gather(own, self.sizes)

    forward = logits
