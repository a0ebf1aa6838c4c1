"""Which part of a model one rank of an instance holds: arithmetic on shapes, no tensors and no processes.

Stages of a pipeline hold whole layers; the ranks of a stage share each layer's heads and features and the vocabulary. A
model file says of each checkpoint tensor how ranks share it (`Split`) and in how many indivisible units; the loader
turns that into slices and reads nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from distserve.errors import ModelError, PlanError
from distserve.sharding import Sharding, heads_fit, rank_heads, split_layers
from distserve.specs import KVLayout, ModelSpec


class Split(Enum):
    """How the ranks of a stage share a weight [rows = output features, columns = input features]."""

    REPLICATED = "replicated"  # each holds all of it
    COLUMN = "column"  # each computes some output features: rows are divided
    ROW = "row"  # each takes some input features: columns are divided, results are summed
    ONCE = "once"  # what is added to such a sum (a bias): the first rank holds it, the others nothing
    VOCABULARY = "vocabulary"  # rows are divided; the first parts may be longer by one
    KV_HEADS = "kv_heads"  # as COLUMN, but where ranks outnumber the heads several hold the same one


@dataclass(frozen=True, slots=True)
class Member:
    """One of the ranks of a stage. The default is the only one."""

    index: int = 0
    size: int = 1

    def all(self) -> list[Member]:
        """It and its likes, in order."""
        return [Member(index, self.size) for index in range(self.size)]


ALONE = Member()


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank stands in its instance: rank = stage * tp + place in the stage."""

    sharding: Sharding
    rank: int = 0

    @classmethod
    def whole(cls, spec: ModelSpec) -> Place:
        """That of an instance's only rank."""
        return cls(Sharding(spec.num_kv_heads, (spec.num_layers,)))

    @property
    def stage(self) -> int:
        return self.rank // self.sharding.tp

    @property
    def member(self) -> Member:
        """Among the ranks of its stage."""
        return Member(self.rank % self.sharding.tp, self.sharding.tp)

    @property
    def is_first(self) -> bool:
        """Its stage embeds."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Its stage has the head."""
        return self.stage == self.sharding.pp - 1

    @property
    def samples(self) -> bool:
        """Logits come together here."""
        return self.is_last and self.member.index == 0

    @property
    def layers(self) -> range:
        return self.sharding.layers(self.rank)

    def part(self, spec: ModelSpec) -> ModelSpec:
        """The model as wide as this rank's share of a layer; it has all layers and the whole vocabulary."""
        tp = self.sharding.tp
        heads = len(self.sharding.heads(self.rank))
        return replace(spec, num_heads=spec.num_heads // tp, num_kv_heads=heads, ffn_size=spec.ffn_size // tp)

    def vocabulary(self, spec: ModelSpec) -> range:
        """The tokens whose rows of the embedding and of the head this rank holds."""
        return vocabulary_part(spec.vocab_size, self.member)

    def kv_layout(self, spec: ModelSpec, block_size: int, dtype: str) -> KVLayout:
        """Of this rank's own blocks."""
        num_heads = len(self.sharding.heads(self.rank))
        return KVLayout(len(self.layers), num_heads, spec.head_dim, block_size, dtype)


def check_degrees(spec: ModelSpec, tp: int, pp: int) -> None:
    """Raises `PlanError` where a model cannot be shared by tp * pp ranks; it lists the degrees that do work."""
    if _fits(spec, tp) and 1 <= pp <= spec.num_layers:
        return
    degrees = [str(degree) for degree in range(1, spec.num_heads + 1) if _fits(spec, degree)]
    raise PlanError(
        f"tp = {tp}, pp = {pp} does not fit a model of {spec.num_heads} heads over {spec.num_kv_heads} KV heads, "
        f"{spec.ffn_size} MLP units and {spec.num_layers} layers: take tp = {' or '.join(degrees)} and pp = 1 to "
        f"{spec.num_layers}"
    )


def sharding_of(spec: ModelSpec, tp: int, pp: int) -> Sharding:
    """Who holds what in an instance of tp * pp ranks. Raises `PlanError`."""
    check_degrees(spec, tp, pp)
    return Sharding(spec.num_kv_heads, split_layers(spec.num_layers, pp), tp)


def _fits(spec: ModelSpec, tp: int) -> bool:
    divides = tp > 0 and spec.num_heads % tp == 0 and spec.ffn_size % tp == 0
    return divides and heads_fit(spec.num_kv_heads, tp) and tp <= spec.vocab_size


def vocabulary_part(num_tokens: int, member: Member) -> range:
    each, more = divmod(num_tokens, member.size)
    first = member.index * each + min(member.index, more)
    return range(first, first + each + (member.index < more))


def share(shape: tuple[int, ...], split: Split, units: int, member: Member) -> tuple[slice, ...]:
    """The slices of a tensor of `shape` that `member` holds. `units`: how many equal groups the divided axis consists
    of (heads, features) and which stay whole. Raises `ModelError` where the number of ranks does not fit."""
    whole = [slice(0, n) for n in shape]
    if split in (Split.REPLICATED, Split.ONCE):
        return tuple(whole)
    axis = 1 if split is Split.ROW else 0
    length = shape[axis]
    assert length % units == 0
    if split is Split.VOCABULARY:
        held = vocabulary_part(units, member)
    elif split is Split.KV_HEADS:
        if not heads_fit(units, member.size):
            raise ModelError(f"tp={member.size} does not fit {units} KV heads; take a multiple or a divisor of {units}")
        held = rank_heads(units, member.size, member.index)
    else:
        if units % member.size:
            raise ModelError(f"tp={member.size} does not divide the model's {units} heads or features; take a divisor")
        step = units // member.size
        held = range(member.index * step, (member.index + 1) * step)
    unit = length // units
    whole[axis] = slice(held.start * unit, held.stop * unit)
    return tuple(whole)
