"""The contract of a model family: modules, a table that says where each checkpoint tensor goes, and one forward pass in
four parts, so that each stage of a pipeline calls its own.

    ids -> embed -> residual stream -> blocks -> ... -> blocks -> residual stream -> final -> logits
           first stage                 every stage                                  last stage

The residual stream [T, C] is fp32 and all that a stage hands to the next. A model is flat: tokens of all sequences lie
in one axis, KV is written to and read from a paged cache that is passed in. It has the modules of one rank only. It
knows no scheduler, no sampling, no file format, and of other ranks only the links.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor, nn

from distserve.engine.collectives import ALONE, Links
from distserve.engine.layers import Head, StepLayout, VocabularyEmbedding
from distserve.engine.parallel import Place, Split
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
    """One rank's part of a model. Built on the meta device, filled by `weights.load`. Layers keep the model's numbers:
    "layers.17" is the eighteenth, whichever stage holds it."""

    prefix: str = ""  # begins the tensors' names, but not in a checkpoint saved without its output head

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, place: Place, links: Links) -> None:
        super().__init__()
        self.spec, self.dtype, self.place, self.links = spec, dtype, place, links
        width = spec.embedding_size or spec.hidden_size
        if place.is_first:
            self.embedding = VocabularyEmbedding(spec.vocab_size, width, links=links, dtype=dtype)
        if place.is_last:
            tied = self.embedding if spec.tied_embeddings and place.is_first else None
            self.head = Head(width, spec.vocab_size, tied=tied, links=links, dtype=dtype)

    def slots(self) -> list[Slot]:
        """Every tensor that the checkpoint must hold, whoever of the ranks takes it."""
        raise NotImplementedError

    def finish(self, max_model_len: int, device: torch.device) -> None:
        """Makes what is computed rather than loaded (position tables). Called once, after loading."""
        raise NotImplementedError

    def embed(self, ids: Tensor, step: StepLayout) -> Tensor:
        """`ids` [T] -> the residual stream before the first layer. First stage only."""
        raise NotImplementedError

    def blocks(self, residual: Tensor, step: StepLayout, kv: Sequence[Tensor], rows: Tensor | None) -> Tensor:
        """This rank's layers on the residual stream [T, C], which may be overwritten; returns it after them, of the
        token `rows` [R] (None: of all). `kv`: each of its layers' cache [num_blocks, 2, KVH, block_size, D], into which
        this step's KV is written."""
        raise NotImplementedError

    def final(self, residual: Tensor) -> Tensor:
        """The residual stream after the last layer -> hidden states for the head. Last stage only."""
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states of R tokens -> fp32 [R, V] at the first rank of the last stage, [0, V] at its others. Last
        stage only."""
        return self.head.logits(hidden)

    def forward(self, ids: Tensor, step: StepLayout, kv: Sequence[Tensor], rows: Tensor | None) -> Tensor:
        """Hidden states of the token `rows` [R] (None: of all), where one stage is the whole model."""
        return self.final(self.blocks(self.embed(ids, step), step, kv, rows))

    def table_slots(self, embedding: str) -> list[Slot]:
        """Of the embedding, whose tensor's name is given, and of the head: the same tensor twice where they are tied
        and apart."""
        size = self.spec.vocab_size
        table = (size, self.spec.embedding_size or self.spec.hidden_size)
        head = embedding if self.spec.tied_embeddings else "lm_head.weight"
        return [
            Slot(embedding, "embedding", "weight", table, Split.VOCABULARY, size),
            Slot(head, "head.out", "weight", table, Split.VOCABULARY, size),
        ]


def build(spec: ModelSpec, dtype: torch.dtype, place: Place | None = None, links: Links = ALONE) -> Model:
    """The modules of one rank's part of `spec` (None: all of it), on the meta device: no memory is taken before weights
    arrive."""
    module = import_module(f"distserve.engine.models.{spec.family}")
    with torch.device("meta"):
        model: Model = module.build(spec, dtype, place or Place.whole(spec), links)
    return model
