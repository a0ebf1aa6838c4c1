"""NIXL, as far as a pull needs it: memory that agents of other hosts may read, and one-sided reads of theirs.

Knows bytes and addresses; what they mean is `nixl.py`. NIXL picks the way (UCX: RDMA where there is a device for it,
the other process's memory on one host, else TCP). Two of its habits shape this file:

- The thread with which it makes progress spins, unless it is told how long it may wait for events: with `WAIT` it costs
  under 1 % of a core when idle. An event wakes it at once; the end of the wait is for events that UCX misses. A source
  needs the thread, too: over TCP, and until two agents have met, it must answer.
- A read that was given up still arrives: neither releasing it nor forgetting the agent keeps UCX from writing the bytes
  that come later. So only the read itself ends a read, and where it lands is free when it is `over`, not before.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from distserve.errors import PullError, UsageError

WAIT = 5000  # microseconds between the progress thread's looks that no event asked for
PACKAGES = ("nixl", "nixl_cu12", "nixl_cu13")  # the first chooses among the others; any of these will do
CURE = "pip install 'distserve[cluster]'; on a machine without a GPU, pip install --no-deps nixl-cu12 is enough"

# What the environment says goes before these.
SETTINGS: Final = {
    "UCX_TCP_TX_SEG_SIZE": "256k",  # doubles TCP's bandwidth
    "UCX_TCP_RX_SEG_SIZE": "256k",
    "UCX_LOG_LEVEL": "fatal",  # lesser errors come as exceptions, too, and we tell them
    "NIXL_LOG_LEVEL": "FATAL",
}
ONE_HOST: Final = {
    "UCX_NET_DEVICES": "lo",  # TCP listens where nobody outside can reach it
    "UCX_USE_MT_MUTEX": "y",  # else the progress thread spins while a read copies; over TCP spinning is the faster
}

Pieces = NDArray[np.uint64]  # [N, 3]: address there, address here, bytes


def require() -> None:
    """Raises `UsageError` with the cure where NIXL is not installed. Loads nothing."""
    if not any(importlib.util.find_spec(name) for name in PACKAGES):
        raise UsageError(f"KV goes between hosts by NIXL, which is not installed: {CURE}")


def _load() -> Any:
    require()
    name = next(name for name in PACKAGES if importlib.util.find_spec(name))
    try:
        # Not its Python class: that one lets the progress thread spin, and offers no choice.
        return importlib.import_module(f"{name}._bindings")
    except ImportError as error:
        raise UsageError(f"NIXL cannot be loaded ({error}): {CURE}") from None


@dataclass(slots=True, eq=False)
class Read:
    """Bytes on their way. Still on their way when nobody wants them any more."""

    request: int  # NIXL's
    over: bool = False  # nothing arrives any more


class Agent:
    """This process's end. Its methods take up to milliseconds and are for threads, which it lets in one by one. (The
    lock is ours, for some of NIXL's calls would wait for its own with Python's global lock in hand.)"""

    def __init__(self, one_host: bool) -> None:
        for name, value in (SETTINGS | ONE_HOST if one_host else SETTINGS).items():
            os.environ.setdefault(name, value)
        nixl = self._nixl = _load()
        config = nixl.nixlAgentConfig()
        config.useProgThread, config.pthrDelay = True, WAIT
        config.syncMode = nixl.NIXL_THREAD_SYNC_STRICT
        self._gone = (nixl.nixlRemoteDisconnectError, nixl.nixlNotFoundError)
        self._errors = tuple(value for name, value in vars(nixl).items() if name.endswith("Error"))
        self._lock = threading.Lock()
        self._registered: dict[int, NDArray[np.uint8]] = {}  # by address; alive as long as NIXL may touch it
        self.name = f"distserve-{os.getpid()}-{secrets.token_hex(4)}"  # unlike any other's, on whatever host
        self._agent = nixl.nixlAgent(self.name, config)
        self._backends = [self._agent.createBackend("UCX", {})]

    def register(self, memory: NDArray[np.uint8]) -> int:
        """Lets others read `memory`, and reads of theirs land there; returns its address."""
        address = memory.ctypes.data
        self._registered[address] = memory
        self._call(self._agent.registerMem, self._region(address), self._backends)
        return address

    def deregister(self, address: int) -> None:
        """No read may be under way there."""
        self._call(self._agent.deregisterMem, self._region(address), self._backends)
        del self._registered[address]

    def metadata(self) -> bytes:
        """What another agent needs to `meet` this one and to read the memory that is registered by now."""
        return bytes(self._call(self._agent.getLocalMD))

    def meet(self, metadata: bytes) -> None:
        """The agent that `metadata` is of can be read from. Tells it nothing yet: that the first read does. Raises
        `PullError`."""
        self._call(self._agent.loadRemoteMD, metadata)

    def forget(self, name: str) -> None:
        """Ends the contact. No read of that agent's memory may be under way. A name that is unknown is forgotten."""
        self._call(self._agent.invalidateRemoteMD, name)

    def read(self, name: str, pieces: Pieces) -> Read:
        """Begins to read from that agent's memory; where the way is the other process's memory, ends it, too. Raises
        `PullError`."""
        nixl = self._nixl
        there, here = np.zeros_like(pieces), np.zeros_like(pieces)
        there[:, 0], here[:, 0] = pieces[:, 0], pieces[:, 1]
        there[:, 1] = here[:, 1] = pieces[:, 2]
        lists = nixl.nixlXferDList(nixl.DRAM_SEG, here), nixl.nixlXferDList(nixl.DRAM_SEG, there)
        read = Read(self._call(self._agent.createXferReq, nixl.NIXL_READ, *lists, name, b"", self._backends))
        self._ask(read, self._agent.postXferReq, read.request, b"")
        return read

    def done(self, read: Read) -> bool:
        """Whether all its bytes are here. Raises `PullError` where they will never be."""
        if not read.over:
            self._ask(read, self._agent.getXferStatus, read.request)
        return read.over

    def close(self) -> None:
        """Ends all contacts and NIXL's thread. To close twice is to close."""
        with self._lock:
            self._agent = None
        self._registered.clear()

    def _ask(self, read: Read, function: Callable[..., Any], *arguments: object) -> None:
        try:
            status = self._call(function, *arguments)
        except PullError:
            self._end(read)
            raise
        if status != self._nixl.NIXL_IN_PROG:
            self._end(read)

    def _end(self, read: Read) -> None:
        read.over = True
        self._call(self._agent.releaseXferReq, read.request)

    def _region(self, address: int) -> Any:
        nixl, size = self._nixl, self._registered[address].nbytes
        return nixl.nixlRegDList(nixl.DRAM_SEG, [(address, size, 0, "")])

    def _call(self, function: Callable[..., Any], *arguments: object) -> Any:
        """Raises `PullError`: "gone" where the other agent is no more, else "transport"."""
        try:
            with self._lock:
                return function(*arguments)
        except self._gone as error:
            raise PullError(f"it is gone ({error})", "gone") from None
        except self._errors as error:
            raise PullError(f"NIXL failed ({error})", "transport") from None
