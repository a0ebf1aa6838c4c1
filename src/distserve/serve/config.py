"""What an instance's process is told when it starts: one line of JSON on its standard input."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from distserve.engine.base import EngineOptions
from distserve.plan import Policy, Role
from distserve.sched.policy import ColocatedPolicy, DecodePolicy, PrefillPolicy


@dataclass(frozen=True, slots=True)
class InstanceConfig:
    """One instance of one epoch."""

    name: str
    role: Role
    epoch: int
    gateway: str  # path of the switchboard's socket
    notices: str  # path of the socket at which this instance takes pulled notices
    engine: EngineOptions
    policy: Policy = Policy.CHUNKED  # colocated only
    max_batch_tokens: int | None = None  # tokens of a batch (colocated, chunked: of a step); None: the knee, measured
    prefill: PrefillPolicy = field(default_factory=PrefillPolicy)
    decode: DecodePolicy = field(default_factory=DecodePolicy)
    colocated: ColocatedPolicy = field(default_factory=ColocatedPolicy)
    transport: str = "shm"  # or nixl; the same for all instances
    log_level: str = "info"
    awake: float = 0.0  # seconds that its cores stay awake after its last work
    steps: str | None = None  # folder of what steps took; None: nobody asked


encode_config = msgspec.json.Encoder().encode
decode_config = msgspec.json.Decoder(InstanceConfig).decode
