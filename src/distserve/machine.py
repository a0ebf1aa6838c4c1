"""What this machine has: cores, memory, GPUs. Asked without torch, because the gateway's process must stay small."""

from __future__ import annotations

import ctypes
import os
from functools import cache

from distserve.errors import UsageError


def cores() -> list[int]:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def memory() -> int:
    """Bytes of main memory; in a container, its limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path, encoding="ascii") as file:
                limit = file.read().strip()
        except OSError:
            continue
        if limit.isdigit():
            total = min(total, int(limit))
    return total


@cache
def gpus() -> int:
    """CUDA devices, asked of the driver; 0 where there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def resolve_device(wanted: str) -> str:
    """ "cpu" or "cuda" for `auto|cpu|cuda` or a name of the device catalogue (a GPU). Raises `UsageError`."""
    if wanted == "auto":
        return "cuda" if gpus() else "cpu"
    if wanted == "cpu":
        return "cpu"
    if not gpus():
        raise UsageError(f"device {wanted} was asked for but this machine shows no CUDA device: use --device cpu")
    return "cuda"


def gpu_memory(index: int) -> int:
    """Bytes of memory of CUDA device `index`."""
    assert index < gpus(), f"no CUDA device {index}"
    driver = ctypes.CDLL("libcuda.so.1")
    device, size = ctypes.c_int(0), ctypes.c_size_t(0)
    if driver.cuDeviceGet(ctypes.byref(device), index) or driver.cuDeviceTotalMem_v2(ctypes.byref(size), device):
        raise UsageError(f"the CUDA driver does not tell the memory of device {index}: give --kv-memory in bytes")
    return size.value
