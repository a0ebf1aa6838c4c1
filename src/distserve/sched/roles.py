"""A role is which scheduler an instance runs. The one place where roles and policies meet schedulers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from distserve.sched.blocks import BlockPool
from distserve.sched.colocated import colocated_scheduler
from distserve.sched.continuous import ContinuousScheduler
from distserve.sched.decode import DecodeScheduler
from distserve.sched.policy import ColocatedPolicy, DecodePolicy, PrefillPolicy
from distserve.sched.prefill import PrefillScheduler
from distserve.sched.turns import TurnsScheduler


@dataclass(frozen=True, slots=True)
class Policies:
    """How instances of each role are tuned."""

    prefill: PrefillPolicy = field(default_factory=PrefillPolicy)
    decode: DecodePolicy = field(default_factory=DecodePolicy)
    colocated: ColocatedPolicy = field(default_factory=ColocatedPolicy)


def scheduler_for(
    role: str,
    pool: BlockPool,
    policies: Policies,
    *,
    policy: str = "chunked",
    batch_tokens: int | None = None,
    max_in_flight: int = 1,
) -> PrefillScheduler | ContinuousScheduler:
    """The scheduler of an instance. `batch_tokens`: what a prefill batch, or a step of a colocated instance, takes at
    most; None: what the policies say."""
    if role == "prefill":
        prefill = policies.prefill
        tokens = batch_tokens or prefill.max_batch_tokens
        return PrefillScheduler(pool, replace(prefill, max_batch_tokens=tokens), max_in_flight=max_in_flight)
    if role == "decode":
        joined = policies.decode.micro_batches == "joined" and max_in_flight > 1
        kind = TurnsScheduler if joined else DecodeScheduler
        return kind(pool, policies.decode, max_in_flight=max_in_flight)
    assert role == "colocated", f"role must be prefill, decode or colocated, not {role!r}"
    colocated = policies.colocated
    if policy == "prefill-first":
        tokens = batch_tokens or colocated.max_batch_tokens
        colocated = replace(colocated, policy="prefill-first", max_batch_tokens=tokens)
    else:
        tokens = max(batch_tokens or colocated.chunk_tokens, colocated.max_batch_size)
        colocated = replace(colocated, policy="chunked", chunk_tokens=tokens)
    return colocated_scheduler(pool, colocated, max_in_flight=max_in_flight)
