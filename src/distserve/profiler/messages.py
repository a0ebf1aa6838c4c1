"""What the command and its workers say to each other: a line of JSON each, one answer to one question."""

from __future__ import annotations

import msgspec

from distserve.engine.base import EngineOptions
from distserve.transfer.base import KVHandle


class Start(msgspec.Struct, frozen=True):
    """To a worker's process, on its standard input: what to load, and how many workers to become."""

    engines: list[EngineOptions]  # of each worker: all alike but for their cores
    sockets: list[int]  # file descriptors, one a worker
    meeting: str  # a folder in which the ranks of a worker meet


class Prompts(msgspec.Struct, frozen=True, tag=True):
    """Time a step of these whole prompts."""

    lengths: list[int]


class Chunks(msgspec.Struct, frozen=True, tag=True):
    """Time a step of pieces of prompts beside sequences that decode."""

    pieces: list[tuple[int, int]]  # (tokens computed already, tokens to compute)
    batch: int = 0
    context: int = 0  # of each of them


class Decodes(msgspec.Struct, frozen=True, tag=True):
    """Time so many steps that decode."""

    batch: int
    context: int  # of each sequence
    steps: int


Work = Prompts | Chunks | Decodes


class Busy(msgspec.Struct, frozen=True, tag=True):
    """Do this over and over, answer at the next message."""

    work: Work


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Enough of it."""


class Publish(msgspec.Struct, frozen=True, tag=True):
    """Promise the first blocks, as after a prompt."""

    blocks: int


class Pull(msgspec.Struct, frozen=True, tag=True):
    """Pull what was promised."""

    handle: KVHandle


ToWorker = Prompts | Chunks | Decodes | Busy | Stop | Publish | Pull


class Loading(msgspec.Struct, frozen=True, tag=True):
    fraction: float
    what: str


class Ready(msgspec.Struct, frozen=True, tag=True):
    """What the instance can hold."""

    num_blocks: int
    block_size: int
    max_model_len: int
    block_bytes: int  # of KV, all layers and heads
    dtype: str


class Took(msgspec.Struct, frozen=True, tag=True):
    """Seconds of each step, or of the one thing that was asked for."""

    seconds: list[float]
    context: float = 0.0  # of all sequences that decoded, in the mean step


class Published(msgspec.Struct, frozen=True, tag=True):
    seconds: float
    handle: KVHandle


class Failed(msgspec.Struct, frozen=True, tag=True):
    """It cannot go on. `usage`: the person can mend it."""

    text: str
    usage: bool


FromWorker = Loading | Ready | Took | Published | Failed

encode = msgspec.json.Encoder().encode
decode_start = msgspec.json.Decoder(Start).decode
decode_to_worker = msgspec.json.Decoder(ToWorker).decode
decode_from_worker = msgspec.json.Decoder(FromWorker).decode
