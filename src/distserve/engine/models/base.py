"""The contract of a model family: modules, a table that says where each checkpoint tensor goes, and one forward pass.

A model is flat: tokens of all sequences lie in one axis, KV is written to and read from a paged cache that is passed
in. It knows no scheduler, no sampling and no file format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor, nn

from distserve.engine.layers import StepLayout
from distserve.engine.parallel import Split
from distserve.specs import ModelSpec


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one checkpoint tensor goes, and how ranks share it."""

    source: str  # its name in a Hugging Face checkpoint
    module: str  # path of the module that holds it; the loader fills a module as a whole, then packs it
    parameter: str  # its name in that module
    shape: tuple[int, ...]  # in the checkpoint
    split: Split = Split.REPLICATED
    units: int = 1  # indivisible groups on the divided axis
    part: int | None = None  # which part of a `MergedLinear` it fills
    rotated_heads: int = 0  # queries and keys: how many heads its rows are (GGUF orders rows within a head differently)


class Model(nn.Module):
    """What the runner drives. Built on the meta device, filled by `weights.load`."""

    spec: ModelSpec

    def slots(self) -> list[Slot]:
        """Every tensor that the checkpoint must hold."""
        raise NotImplementedError

    def finish(self, max_model_len: int, device: torch.device) -> None:
        """Makes what is computed rather than loaded (position tables). Called once, after loading."""
        raise NotImplementedError

    def forward(self, ids: Tensor, step: StepLayout, kv: Sequence[Tensor], rows: Tensor | None) -> Tensor:
        """`ids` [T]; `kv`: each layer's cache [num_blocks, 2, KVH, block_size, D]; writes this step's KV into it.
        Returns final hidden states [R, C] of the token `rows` [R] (None: of all)."""
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, C] -> fp32 [R, V]."""
        raise NotImplementedError


def build(spec: ModelSpec, dtype: torch.dtype) -> Model:
    """The modules of `spec`, on the meta device: no memory is taken before weights arrive."""
    module = import_module(f"distserve.engine.models.{spec.family}")
    with torch.device("meta"):
        model: Model = module.build(spec, dtype)
    return model
