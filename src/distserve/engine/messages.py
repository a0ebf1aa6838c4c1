"""What the driver of an instance and its ranks say to each other, as msgpack. Data only: no socket, no tensor.

driver -> rank   Begin, then a Step for each batch                the end of the line: leave
rank -> driver   Progress, then Begun or Failed; the rank that samples: Computed for each Step, in their order
"""

from __future__ import annotations

import msgspec

from distserve.engine.base import EngineOptions, EngineResult
from distserve.engine.step import StepInput
from distserve.request import Request
from distserve.sharding import Sharding


class Message(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """One message on a rank's line."""


class Begin(Message, frozen=True):
    """Who it is. Everything that a rank does in its life follows from this."""

    name: str  # of the instance, for the log
    rank: int
    sharding: Sharding  # of the instance
    options: EngineOptions  # with this rank's own device and cores
    num_blocks: int
    memory: str  # where its KV memory is
    rendezvous: str  # path of a file that is the ranks' alone
    log_level: str = "info"


class Step(Message, frozen=True):
    """Compute this. Before that: forget requests, and know others (the rank that samples; the others are not told)."""

    input: StepInput
    forgotten: list[int] = []
    added: list[Request] = []


class Stage(Message, frozen=True):
    """Between the device and the KV memory, on a line of its own that is answered with an empty message: makes the
    memory hold what the device has in `blocks`, or the other way round. (CPU: never sent, they are the same.)"""

    blocks: list[int]
    to_device: bool


class Progress(Message, frozen=True):
    fraction: float
    what: str


class Begun(Message, frozen=True):
    """It has loaded and warmed up."""


class Computed(Message, frozen=True):
    result: EngineResult


class Failed(Message, frozen=True):
    """It leaves; `usage`: the user can mend it."""

    text: str
    usage: bool


ToRank = Begin | Step
ToDriver = Progress | Begun | Computed | Failed

encode = msgspec.msgpack.Encoder().encode
decode_to_rank = msgspec.msgpack.Decoder(ToRank).decode
decode_to_driver = msgspec.msgpack.Decoder(ToDriver).decode
decode_stage = msgspec.msgpack.Decoder(Stage).decode
