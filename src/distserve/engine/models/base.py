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
    shape: tuple[int, ...]  # in the checkpoint, were it neither transposed nor fused
    split: Split = Split.REPLICATED
    units: int = 1  # indivisible groups on the divided axis
    part: int | None = None  # which part of a `MergedLinear` it fills
    rotated_heads: int = 0  # queries and keys: how many heads its rows are (GGUF orders rows within a head differently)
    transposed: bool = False  # the checkpoint has (columns, rows): input features first
    fused: int = 1  # the checkpoint's tensor is this many such parts, one under the other; this slot is number `part`

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of the checkpoint's tensor."""
        shape = (self.shape[0] * self.fused, *self.shape[1:])
        return shape[::-1] if self.transposed else shape

    def stored_slices(self, slices: tuple[slice, ...]) -> tuple[slice, ...]:
        """Where `slices` of this slot lie in the checkpoint's tensor."""
        rows = slices[0]
        if self.fused > 1:
            assert self.part is not None
            first = self.part * self.shape[0]
            rows = slice(rows.start + first, rows.stop + first)
        found = (rows, *slices[1:])
        return found[::-1] if self.transposed else found


class Model(nn.Module):
    """What the runner drives. Built on the meta device, filled by `weights.load`."""

    spec: ModelSpec
    prefix: str = ""  # begins the tensors' names, but not in a checkpoint saved without its output head

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
