"""What this machine has: cores, memory, GPUs. Asked without torch, because the gateway's process must stay small."""

from __future__ import annotations

import ctypes
import os
import platform
import re
from functools import cache
from pathlib import Path
from typing import Literal, cast, get_args

from distserve.errors import UsageError

DEFAULT_KV = 1 << 30  # bytes of an instance's KV memory on a CPU, where nobody says another size

# In the environment: the most that the CPU kernels use. auto: all this machine can; vectors: no AMX tiles; generic:
# plain C, matrix products by torch; off: plain torch.
KERNELS_DIAL = "DISTSERVE_KERNELS"
Kernels = Literal["auto", "vectors", "generic", "off"]


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


def device_name(device: str) -> str:
    """What a cluster or a costs file calls a device of this machine: "cpu", or the GPU's name as the catalogue has it
    ("h200" of "NVIDIA H200", "a100-80g" of "NVIDIA A100-SXM4-80GB")."""
    return "cpu" if device == "cpu" else catalogue_name(gpu_name(0))


def catalogue_name(name: str) -> str:
    """Of a GPU, from its driver's name: without the maker, the socket and the kind of memory."""
    words = re.split(r"[\s-]+", name.lower())
    telling = [word for word in words if not re.fullmatch(r"nvidia|tesla|geforce|sxm\d?|hbm\w*", word)]
    return re.sub(r"(\d)gb\b", r"\1g", "-".join(telling)) or "cuda"


def gpu_name(index: int) -> str:
    """As the driver calls it."""
    assert index < gpus(), f"no CUDA device {index}"
    driver = ctypes.CDLL("libcuda.so.1")
    device, name = ctypes.c_int(0), ctypes.create_string_buffer(256)
    if driver.cuDeviceGet(ctypes.byref(device), index) or driver.cuDeviceGetName(name, len(name), device):
        return ""
    return name.value.decode(errors="replace")


def fingerprint(device: str) -> str:
    """By which costs know whether they were measured on a machine like this: what computes, and how much of it."""
    if device != "cpu":
        return f"{gpus()}x {gpu_name(0)}, {gpu_memory(0) / 2**30:.0f} GiB"
    dial = "" if kernels() == "auto" else f", {KERNELS_DIAL}={kernels()}"
    return f"{processor()}, {os.cpu_count()} cores, {memory() / 2**30:.0f} GiB{dial}"


def kernels() -> Kernels:
    """What the environment's dial says. Raises `UsageError`."""
    value = os.environ.get(KERNELS_DIAL, "auto")
    if value not in get_args(Kernels):
        raise UsageError(f"{KERNELS_DIAL}={value} is unknown; it is one of {', '.join(get_args(Kernels))}")
    return cast(Kernels, value)


# What decides how fast a core multiplies, beside its name: virtual machines often hide the latter.
_TELLING = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "sve", "asimd")


@cache
def processor() -> str:
    """The processor's name and what it can do."""
    found: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            found.setdefault(key.strip(), value.strip())
    except OSError:
        return platform.processor() or platform.machine()
    able = set((found.get("flags") or found.get("Features") or "").split())
    name = found.get("model name") or platform.machine()
    numbers = ".".join(found[key] for key in ("cpu family", "model", "stepping") if key in found)
    return f"{name} ({' '.join(filter(None, (numbers, *(flag for flag in _TELLING if flag in able))))})"
