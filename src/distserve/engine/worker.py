"""One rank of an instance, in a process of its own: loads its slice of the weights, then computes step after step.

    line from the driver -> Step -> Runner (with links to the other ranks) -> Computed, where this rank samples

It does one thing at a time and waits for its line meanwhile. Who schedules, and who pulls KV out of its memory or into
it, it does not know. It leaves when its line ends.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch.distributed  # here, so that whoever forks ranks has imported it before

from distserve.engine import collectives, kernels
from distserve.engine.kv_cache import Buffer, KVCache
from distserve.engine.loaded import Progress as Tell
from distserve.engine.loaded import load
from distserve.engine.messages import (
    Begin,
    Begun,
    Computed,
    Failed,
    Progress,
    Step,
    decode_stage,
    decode_to_rank,
    encode,
)
from distserve.engine.parallel import Place
from distserve.engine.runner import Runner
from distserve.engine.state import RequestState
from distserve.errors import UsageError
from distserve.line import WaitingLine

log = logging.getLogger(__name__)

Attach = Callable[[str, int], Buffer]  # (where, bytes) -> writable memory that the driver has made


def main(end: socket.socket, side: socket.socket, attach: Attach) -> int:
    """The whole life of a rank on its ends of two sockets to its driver: `end` for steps, `side` for staging KV.
    Returns the process's exit status."""
    line = WaitingLine(end)
    message = line.receive()
    if message is None:
        return 0
    begin = decode_to_rank(message)
    assert isinstance(begin, Begin), "the first message says who this is"
    logging.basicConfig(
        level=begin.log_level.upper(),
        format=f"%(levelname)s {begin.name} rank {begin.rank}: %(message)s",
        force=True,
        stream=sys.stderr,
    )
    try:
        return _live(line, WaitingLine(side), begin, attach)
    except ConnectionError:
        log.info("the driver is gone; leaving")
        return 0


def _live(line: WaitingLine, side: WaitingLine, begin: Begin, attach: Attach) -> int:
    try:
        rank = _Rank(begin, attach, lambda fraction, what: line.send(encode(Progress(fraction, what))))
        if begin.options.device != "cpu":
            threading.Thread(target=stage_blocks, args=(side, rank.kv), name="stage", daemon=True).start()
        line.send(encode(Begun()))
        while (message := line.receive()) is not None:
            step = decode_to_rank(message)
            assert isinstance(step, Step)
            answer = rank.compute(step)
            if answer is not None:
                line.send(encode(answer))
    except UsageError as error:
        line.send(encode(Failed(str(error), usage=True)))
        return 2
    except ConnectionError:
        raise
    except Exception as error:
        log.exception("rank %d of %s fails", begin.rank, begin.name)
        line.send(encode(Failed(f"{type(error).__name__}: {error}", usage=False)))
        return 1
    return 0


class Staging(Protocol):
    """What moves KV between a device and the memory that others see (`KVCache`)."""

    def export_blocks(self, blocks: list[int]) -> None: ...

    def import_blocks(self, blocks: list[int]) -> None: ...


def stage_blocks(side: WaitingLine, kv: Staging) -> None:
    """Moves KV as it is told, until the line ends; says after each move that it is done."""
    while (message := side.receive()) is not None:
        stage = decode_stage(message)
        (kv.import_blocks if stage.to_device else kv.export_blocks)(stage.blocks)
        side.send(b"")


class _Rank:
    """Loaded, linked to the others, and warm."""

    def __init__(self, begin: Begin, attach: Attach, progress: Tell) -> None:
        options = begin.options
        if options.cores:
            os.sched_setaffinity(0, options.cores)
            kernels.set_num_threads(len(options.cores))
        place = Place(begin.sharding, begin.rank)
        progress(0.0, "meeting the other ranks")
        links = collectives.connect(place, torch.device(options.device), Path(begin.rendezvous))
        loaded = load(options, progress, place, links)
        layout = place.kv_layout(loaded.spec, options.block_size, loaded.dtype)
        progress(0.9, "allocating KV memory")
        buffer = attach(begin.memory, begin.num_blocks * layout.block_bytes)
        self.kv = KVCache(layout, begin.num_blocks, buffer, loaded.device)
        max_model_len = min(loaded.max_model_len, begin.num_blocks * options.block_size)
        self._runner = Runner(loaded.model, self.kv, max_model_len, loaded.device)
        self._samples = place.samples
        self._spec = loaded.spec
        self._states: dict[int, RequestState] = {}
        progress(0.92, "warming up")
        self._runner.warm_up()

    def compute(self, step: Step) -> Computed | None:
        """None: another rank answers."""
        for request_id in step.forgotten:
            self._states.pop(request_id, None)
        for request in step.added:
            self._states[request.id] = RequestState(request, self._spec.vocab_size, self._spec.eos_token_ids)
        result = self._runner.run(step.input, self._states)
        return Computed(result) if self._samples else None
