"""The contract of what predicts: how long a step takes, how much KV fits, how an engine spends its time beside
computing. Knows no plan and no simulator; implementations are a profile (`profile.py`) and a roofline.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from distserve.cluster import Cluster
from distserve.costs.latency import Host, Latency
from distserve.specs import ModelSpec


@dataclass(frozen=True, slots=True)
class Neighbour:
    """How many times as long a step takes while an instance on a device beside it computes prompts, or decodes."""

    prefill: float = 1.0
    decode: float = 1.0


class Pace(NamedTuple):
    """From `at` (seconds) on, steps with prompts and steps that decode take so many times what their costs say."""

    at: float
    prompts: float
    decodes: float


@dataclass(frozen=True, slots=True)
class Weather:
    """How a machine's pace changed while it was measured: what others did to it, and will do again. Imagined time goes
    through it over and over, each instance from another moment on."""

    paces: tuple[Pace, ...] = ()  # by time, the first at 0; (): always as fast as its costs say
    span: float = 0.0  # seconds that were watched; 0: the last pace holds for ever

    @property
    def mean(self) -> tuple[float, float]:
        """(of prompts, of decodes), over the span."""
        if not self.paces:
            return 1.0, 1.0
        ends = [pace.at for pace in self.paces[1:]] + [self.span]
        lasts = [(end - pace.at) / self.span for pace, end in zip(self.paces, ends, strict=True)]
        return (
            sum([pace.prompts * share for pace, share in zip(self.paces, lasts, strict=True)]),
            sum([pace.decodes * share for pace, share in zip(self.paces, lasts, strict=True)]),
        )


FAIR = Weather()


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine's habits: what it costs beside arithmetic, and how it batches where a plan does not say. The defaults
    are those of this project's own engine, with costs of nothing where nothing was measured."""

    name: str = "distserve"
    request: float = 0.0  # seconds from a request's arrival until a scheduler knows it
    poll: float = 0.0  # seconds between two looks of an idle instance at its queue; 0: it is told
    prompt_step: Host = field(default_factory=Host)  # of steps with prompts
    decode_step: Host = field(default_factory=Host)
    padded: bool = False  # prompts of one step are computed as long as the longest of them
    handover: float = 0.0  # seconds between two pipeline stages
    publish: float = 0.0  # seconds that a prefill instance shows a prompt's KV to pullers, beside its bytes
    publish_bandwidth: float | None = None  # bytes/s of that; None: endless
    pull: float = 0.0  # seconds of a pull beside its bytes, with the publishing that it waits for
    pull_bandwidth: float | None = None  # bytes/s of a pull between two devices; None: what the cluster's links give
    pulls_stall: bool = False  # no step runs on the decode side while it pulls
    swap_bandwidth: float | None = None  # bytes/s; a preempted sequence's KV is kept in host memory. None: recomputed
    block_size: int = 32  # tokens
    prefill_batch_tokens: int | None = None  # None: the knee
    prefill_batch_size: int = 64
    decode_batch_size: int = 256
    chunk_tokens: int | None = None  # colocated, chunked: tokens of a step. None: the knee
    colocated_batch_tokens: int | None = None  # prefill-first: prompt tokens of a step. None: the knee
    watermark_blocks: int = 4
    kv_memory: int | None = None  # bytes of KV on a device where a plan does not say; None: what the weights leave
    micro_batches: Literal["even", "joined"] = "even"
    prefill_beside: Neighbour = field(default_factory=Neighbour)  # of steps with prompts
    decode_beside: Neighbour = field(default_factory=Neighbour)
    weather: Weather = FAIR


class Costs(Protocol):
    """What the instances of one model on one kind of device cost."""

    name: str
    spec: ModelSpec
    dtype: str
    engine: Engine

    def latency(self, tp: int, pp: int) -> Latency:
        """Of an instance. Raises `PlanError` where nothing is known of this parallelism, naming what is."""
        ...

    def kv_blocks(self, tp: int, pp: int, kv_memory: int | float | None = None) -> int:
        """Blocks (of `engine.block_size` tokens) that fit beside the weights, at most `kv_memory` (bytes, or a share of
        the device's memory) of them on a device. Raises `PlanError` where none do."""
        ...

    def degrees(self) -> tuple[tuple[int, int | None], ...]:
        """The parallelisms that `latency` answers for, in order, each (tp, pp); pp None: whatever pp."""
        ...

    def assumed_cluster(self, num_devices: int) -> Cluster:
        """Where nobody says how the devices are connected: as their vendor builds them."""
        ...

    def notes(self, tokens: int, batch: int, context: int) -> list[str]:
        """What a reader of a prediction should know: a sentence for each measured range that these largest numbers (of
        prompt tokens in a step, sequences in a step, summed context) lie beyond."""
        ...
