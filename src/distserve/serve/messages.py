"""What gateway and instances say to each other, as msgpack. Data only: no socket, no behaviour.

    gateway -> instance   Submit, Abort, Release, Audit, Meet, Part, Drain, Stop
    instance -> gateway   Loading, Ready, Fatal, Step (once a step), Beat, Unknown, Drained
    decode -> prefill     Pulled, Renew

Every message names the epoch it belongs to; one of another epoch is ignored. A request is named by (id, attempt).
"""

from __future__ import annotations

import msgspec

from distserve.request import Request, Token
from distserve.sched.base import Load
from distserve.transfer.base import KVHandle, KVSource

Name = tuple[int, int]  # (request id, attempt)


class Message(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """`epoch` is the receiving instance's on the way there, the sending instance's on the way back."""

    epoch: int


class Submit(Message, frozen=True):
    """Prefill, decode or both, as the instance's role has it. `handle`: KV to pull (decode only)."""

    request: Request
    handle: KVHandle | None = None


class Abort(Message, frozen=True):
    names: list[Name]


class Release(Message, frozen=True):
    """Held KV that will not be pulled."""

    names: list[Name]


class Audit(Message, frozen=True):
    """All that the gateway believes to be alive here: what it awaits tokens of, and what is held for a pull. Renews
    leases; what is not listed is dropped; what is not so comes back in `Unknown`. Heals what lost messages broke."""

    awaited: list[Name]
    held: list[Name]


class Meet(Message, frozen=True):
    """To the decode side: KV will be pulled from these; make first contact now."""

    sources: list[KVSource]


class Part(Message, frozen=True):
    """To the decode side: this epoch is over; what waits to be pulled from it never will be."""

    instance: str
    source_epoch: int


class Drain(Message, frozen=True):
    """No new work; answer `Drained` when nothing is left."""


class Stop(Message, frozen=True):
    """Leave now."""


class Loading(Message, frozen=True):
    fraction: float
    what: str


class Ready(Message, frozen=True):
    """The instance can work. `source` says where its KV can be read."""

    source: KVSource
    num_blocks: int
    block_size: int
    max_model_len: int
    pid: int


class Fatal(Message, frozen=True):
    """The instance cannot start; `usage`: the user can mend it (exit status 2)."""

    text: str
    usage: bool


class Event(msgspec.Struct, array_like=True, frozen=True):
    """One request's token: number `index` of its output, so that a lost or doubled message is noticed."""

    id: int
    attempt: int
    index: int
    token: Token


class Failure(msgspec.Struct, array_like=True, frozen=True):
    """An attempt that ended here without an answer. `kind`: "request" (the client's fault), "pull", "draining",
    "engine"; `reason` is PullError's."""

    id: int
    attempt: int
    kind: str
    text: str
    reason: str = ""


class Timing(msgspec.Struct, array_like=True, frozen=True):
    """Where an attempt's time went on this instance, sent once, with its first token here. Seconds and bytes."""

    id: int
    attempt: int
    queued: float  # from arrival here to its first batch (decode: to the start of its pull)
    pull: float  # decode: reading and checking KV
    pull_bytes: int
    computed: float  # from first batch (decode: from the end of the pull) to the first token here


class Step(Message, frozen=True):
    """Everything that a step changed."""

    events: list[Event] = []
    handles: list[KVHandle] = []  # prefill: KV that now waits to be pulled (its token went ahead)
    pulled: list[Name] = []
    failures: list[Failure] = []
    timings: list[Timing] = []
    publishing: list[float] = []  # prefill: seconds that making each of `handles` took
    load: Load = Load()
    num_batched_tokens: int = 0
    seconds: float = 0.0


class Beat(Message, frozen=True):
    """Sign of life. `busy`: seconds the current step has taken so far (0: idle), `expected`: what it should take."""

    busy: float
    expected: float
    load: Load


class Unknown(Message, frozen=True):
    """Of an audit's names: those of which no token will come, and those that are not held (any more)."""

    awaited: list[Name]
    held: list[Name]


class Drained(Message, frozen=True):
    pass


class Pulled(Message, frozen=True):
    """From the decode side, to the epoch that holds the KV: its blocks may be freed."""

    name: Name


class Renew(Message, frozen=True):
    """From the decode side, at every beat, to the epoch that holds the KV: these will still be pulled."""

    names: list[Name]


Notice = Pulled | Renew
ToInstance = Submit | Abort | Release | Audit | Meet | Part | Drain | Stop | Notice
ToGateway = Loading | Ready | Fatal | Step | Beat | Unknown | Drained

encode = msgspec.msgpack.Encoder().encode
decode_to_instance = msgspec.msgpack.Decoder(ToInstance).decode
decode_to_gateway = msgspec.msgpack.Decoder(ToGateway).decode
