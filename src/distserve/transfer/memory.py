"""Memory that another process of this host can map: anonymous, so that nothing is left behind however its owner dies.

On Linux it is a memfd, reached by others as /proc/PID/fd/FD: it has no name to clean up, and the small /dev/shm of
containers does not limit it. Elsewhere it is a temporary file that is removed on close.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
import tempfile

from distserve.errors import PullError

MADV_POPULATE_WRITE = 23  # not in the mmap module yet


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
        self._map: mmap.mmap | None = mmap.mmap(self._fd, max(size, 1))
        self.buffer = memoryview(self._map)[:size]

    def touch(self, size: int) -> None:
        """Takes the first `size` bytes now. A page costs about ten times its copy when it is first written, and a block
        pool uses its first blocks first."""
        assert self._map is not None, "closed"
        if size and sys.platform == "linux":
            with contextlib.suppress(OSError):  # Linux before 5.14 takes pages only as they are written
                self._map.madvise(MADV_POPULATE_WRITE, 0, min(size, self.size))

    def close(self) -> None:
        """Gives the memory back. Views that others still hold (tensors over it) keep the mapping until they go."""
        if self._fd < 0:
            return
        os.close(self._fd)
        self._fd = -1
        self.buffer, self._map = memoryview(b""), None
        if self._file is not None:
            os.unlink(self._file)


def attach(path: str, size: int) -> memoryview:
    """Maps another process's shared memory for reading. Raises `PullError("gone")` where the owner is no more."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise PullError(f"the KV memory {path} is gone: {error.strerror}", "gone") from None
    try:
        if os.fstat(fd).st_size < size:
            raise PullError(f"the KV memory {path} is {os.fstat(fd).st_size} bytes, {size} were promised", "stale")
        return memoryview(mmap.mmap(fd, size, prot=mmap.PROT_READ))
    finally:
        os.close(fd)
