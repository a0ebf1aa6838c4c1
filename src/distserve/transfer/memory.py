"""Memory that another process of this host can map: anonymous, so that nothing is left behind however its owner dies.

On Linux it is a memfd, reached by others as /proc/PID/fd/FD: it has no name to clean up, and the small /dev/shm of
containers does not limit it. Elsewhere it is a temporary file that is removed on close.

The pages taken first are 2 MiB where Linux can make them so (6.1 or newer, asked for by MADV_COLLAPSE, which needs no
setting of the system): a copy then waits for bytes only, not for page tables. File and address must be aligned alike
for that, so large memory is mapped to an address of our choice.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
import tempfile
import weakref

import numpy as np

from distserve.errors import PullError

MADV_POPULATE_READ, MADV_POPULATE_WRITE, MADV_COLLAPSE = 22, 23, 25  # not in the mmap module yet
_HUGE = 2 << 20  # bytes of a large page
_PROT_NONE, _MAP_FIXED = 0, 0x10  # these neither
_NOWHERE = ctypes.c_void_p(-1).value  # where mmap failed


class SharedMemory:
    """`size` bytes of zeros, shared. `path` is how another process of the same user and host opens them."""

    def __init__(self, size: int) -> None:
        self.size = size
        if hasattr(os, "memfd_create"):
            self._fd = os.memfd_create("distserve-kv", os.MFD_CLOEXEC)
            self.path = f"/proc/{os.getpid()}/fd/{self._fd}"
            self._file = None
        else:
            self._fd, self._file = tempfile.mkstemp(prefix="distserve-kv-")
            self.path = self._file
        os.ftruncate(self._fd, max(size, 1))
        self.buffer = _map(self._fd, max(size, 1), writable=True)[:size]

    def touch(self, size: int) -> None:
        """Takes the first `size` bytes now, in large pages. A page costs about ten times its copy when it is first
        written, and a block pool uses its first blocks first."""
        assert self._fd >= 0, "closed"
        size = min(size, self.size)
        if size and sys.platform == "linux":
            huge = size // _HUGE * _HUGE
            for at in range(0, huge, _HUGE):  # only what holds something can collapse
                _advise(self.buffer, at, 1, MADV_POPULATE_WRITE)
            if huge:
                _advise(self.buffer, 0, huge, MADV_COLLAPSE)
            _advise(self.buffer, 0, size, MADV_POPULATE_WRITE)

    def close(self) -> None:
        """Gives the memory back. Views that others still hold (tensors over it) keep the mapping until they go."""
        if self._fd < 0:
            return
        os.close(self._fd)
        self._fd = -1
        self.buffer = memoryview(b"")
        if self._file is not None:
            os.unlink(self._file)


def attach(path: str, size: int, *, writable: bool = False) -> memoryview:
    """Maps another process's shared memory for reading, or for writing too. Raises `PullError("gone")` where the owner
    is no more."""
    try:
        fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
    except OSError as error:
        raise PullError(f"the KV memory {path} is gone: {error.strerror}", "gone") from None
    try:
        if os.fstat(fd).st_size < size:
            raise PullError(f"the KV memory {path} is {os.fstat(fd).st_size} bytes, {size} were promised", "stale")
        view = _map(fd, size, writable=writable)
        if sys.platform == "linux" and (taken := min(size, os.lseek(fd, 0, os.SEEK_HOLE))):
            _advise(view, 0, taken, MADV_POPULATE_READ)  # not the rest: reading a hole fills it
        return view
    finally:
        os.close(fd)


def _map(fd: int, size: int, *, writable: bool) -> memoryview:
    """The first `size` bytes of a file, shared; on Linux at a multiple of _HUGE. Unmapped with the last view of it."""
    prot = mmap.PROT_READ | mmap.PROT_WRITE if writable else mmap.PROT_READ
    if sys.platform != "linux" or size < _HUGE:
        return memoryview(mmap.mmap(fd, size, prot=prot))
    room = _mmap(None, size + _HUGE, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
    address = _mmap(-(-room // _HUGE) * _HUGE, size, prot, mmap.MAP_SHARED | _MAP_FIXED, fd)
    array = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(array, _libc().munmap, room, size + _HUGE).atexit = False  # threads may use it until the very end
    view = memoryview(array).cast("B")
    return view if writable else view.toreadonly()


def _mmap(address: int | None, size: int, prot: int, flags: int, fd: int) -> int:
    found = _libc().mmap(address, size, prot, flags, fd, 0)
    if found == _NOWHERE:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(found)


def _advise(view: memoryview, offset: int, size: int, advice: int) -> None:
    """Advice that this Linux does not know, or cannot follow now, is not followed: it is about speed alone."""
    _libc().madvise(np.frombuffer(view, np.uint8).ctypes.data + offset, size, advice)


@functools.cache
def _libc() -> ctypes.CDLL:
    library, size, number = ctypes.CDLL(None, use_errno=True), ctypes.c_size_t, ctypes.c_int
    library.mmap.argtypes = (ctypes.c_void_p, size, number, number, number, ctypes.c_int64)
    library.mmap.restype = ctypes.c_void_p
    library.munmap.argtypes = (ctypes.c_void_p, size)
    library.madvise.argtypes = (ctypes.c_void_p, size, number)
    return library
