"""The numbers a scheduler is tuned by, checked where they are born. Knows no scheduler and no device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


def _at_least(owner: object, least: int, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}: raise it, or leave it out for the default")


@dataclass(frozen=True, slots=True)
class PrefillPolicy:
    """How prompts are batched, and how long their KV is kept for a puller that gives no sign of life."""

    max_batch_tokens: int = 2048  # Lm, the knee: the tokens that saturate the device; a longer prompt goes alone
    max_batch_size: int = 64  # sequences in one batch
    lease: float = 10.0  # seconds

    def __post_init__(self) -> None:
        _at_least(self, 1, "max_batch_tokens", "max_batch_size")
        if not (0 < self.lease < math.inf):
            raise ValueError(
                f"lease must be above 0 and finite, not {self.lease}: without an end, the KV of a lost request is "
                "never freed; give the seconds after which a silent puller counts as gone"
            )


@dataclass(frozen=True, slots=True)
class DecodePolicy:
    """How many sequences decode together, and what they leave room for."""

    max_batch_size: int = 256  # sequences with KV here at once, over all batches in flight
    chunk_tokens: int = 512  # tokens a step may recompute beside its decodes; more lets a running token wait longer
    watermark_blocks: int = 4  # blocks an admission leaves free for the growth of what runs
    # Who decodes together where several batches are in flight. "even": all that run, split evenly at every step;
    # "joined": each stays with those it joined (`turns.py`).
    micro_batches: Literal["even", "joined"] = "even"

    def __post_init__(self) -> None:
        _at_least(self, 1, "max_batch_size", "chunk_tokens")
        _at_least(self, 0, "watermark_blocks")
        if self.micro_batches not in ("even", "joined"):
            raise ValueError(f'micro_batches must be "even" or "joined", not {self.micro_batches!r}')


@dataclass(frozen=True, slots=True)
class ColocatedPolicy:
    """How prompts and decodes share one device.

    "chunked": every step decodes all that runs and fills up to `chunk_tokens` with pieces of prompts (Sarathi-Serve,
    OSDI'24, section 4.2). "prefill-first": whole prompts, up to `max_batch_tokens` together, go before all decodes
    (iteration-level scheduling as in vLLM 0.2.3).
    """

    policy: Literal["chunked", "prefill-first"] = "chunked"
    max_batch_size: int = 256  # sequences with KV here at once, over all batches in flight
    chunk_tokens: int = 512  # chunked: tokens of one step, decodes included
    max_batch_tokens: int = 2048  # prefill-first: prompt tokens of one step; a longer prompt goes alone
    watermark_blocks: int = 4  # blocks an admission leaves free for the growth of what runs

    def __post_init__(self) -> None:
        if self.policy not in ("chunked", "prefill-first"):
            raise ValueError(f'policy must be "chunked" or "prefill-first", not {self.policy!r}')
        _at_least(self, 1, "max_batch_size", "chunk_tokens", "max_batch_tokens")
        _at_least(self, 0, "watermark_blocks")
        if self.policy == "chunked" and self.chunk_tokens < self.max_batch_size:
            raise ValueError(
                f"chunk_tokens ({self.chunk_tokens}) must be at least max_batch_size ({self.max_batch_size}), or "
                "decodes could fill every step and no prompt would start: raise chunk_tokens or lower max_batch_size"
            )


@dataclass(frozen=True, slots=True)
class AdmissionPolicy:
    """What the gateway lets in. Beyond any of these a request is refused at once: what was admitted must keep its SLO,
    and no queue may grow without bound."""

    max_requests: int = 2048  # admitted and not yet over
    max_queued_tokens: int = 4_000_000  # prompt tokens that wait or are being computed, over all instances
    max_wait: float = 60.0  # seconds until the prompt's turn, as predicted

    def __post_init__(self) -> None:
        _at_least(self, 1, "max_requests", "max_queued_tokens")
        if not self.max_wait > 0:
            raise ValueError(f"max_wait must be above 0, not {self.max_wait}: every request would be refused")
