"""A checkpoint in memory, ready to compute: what instances with the same weights can share by being forked.

`load` starts no thread and keeps no lock, so that a process may fork after it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from distserve.engine import hub, weights
from distserve.engine.base import EngineOptions
from distserve.engine.collectives import ALONE, Links
from distserve.engine.models.base import Model, build
from distserve.engine.parallel import Place
from distserve.errors import ModelError, PlanError
from distserve.specs import DTYPE_BYTES, ModelSpec

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_TRIM_EVERY = 8  # modules: a trim takes a millisecond, and what it gave back must be asked for anew
_SCRATCH = 256 << 20  # bytes that a process may keep for its next step

Progress = Callable[[float, str], None]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """One rank's weights on a device, packed for it. Nothing writes to it any more."""

    spec: ModelSpec  # of the whole model
    model: Model  # this rank's part of it
    dtype: str
    device: torch.device
    max_model_len: int  # tokens of context, as the checkpoint and the options allow


def load(options: EngineOptions, progress: Progress, place: Place | None = None, links: Links = ALONE) -> LoadedModel:
    """Of `options` it heeds the model, the device, the dtype and the context. `place`, `links`: of a rank among several
    (None: the only one). Raises `ModelError`, `PlanError`."""
    path = Path(options.model)
    progress(0.0, "reading the configuration")
    spec = hub.read_spec(path)
    device, dtype, context = _device(options.device), _dtype(options.dtype, spec), _context(options, spec)

    num_modules = 0

    def module_is_there(fraction: float) -> None:
        nonlocal num_modules
        num_modules += 1
        if num_modules % _TRIM_EVERY == 0:
            _trim_heap()
        progress(0.05 + 0.85 * fraction, "loading weights")

    with torch.inference_mode():
        model = build(spec, getattr(torch, dtype), place, links)
        weights.load(
            path,
            model,
            device,
            module_is_there,
            mixed=options.dtype != "auto",
        )
        model.finish(context, device)
    _trim_heap()
    _keep_scratch()
    return LoadedModel(spec, model, dtype, device, context)


def _trim_heap() -> None:
    """Gives the system back what loading used in passing: glibc would keep it between the pieces of what comes next
    (100 MB for a model of 135M weights, at the peak)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _keep_scratch() -> None:
    """glibc: what a step frees is what the next step allocates. Given back to the system in between, it comes back as a
    page fault for every 4 KiB: 10,000 of them in a prompt of 2,048 tokens."""
    tune = getattr(ctypes.CDLL(None), "mallopt", None)
    if tune is not None:
        tune(_M_TRIM_THRESHOLD, _SCRATCH)
        tune(_M_MMAP_THRESHOLD, _SCRATCH)


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise PlanError(f"device {name} is not there: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def _dtype(asked: str, spec: ModelSpec) -> str:
    dtype = spec.dtype if asked == "auto" else asked
    if dtype not in DTYPE_BYTES:
        raise ModelError(f"dtype {dtype!r} is not supported; give --dtype as one of {', '.join(DTYPE_BYTES)}")
    return dtype


def _context(options: EngineOptions, spec: ModelSpec) -> int:
    asked = options.max_model_len
    if asked is None:
        return spec.max_model_len
    if asked > spec.max_model_len:
        raise ModelError(f"--max-model-len {asked} is over the checkpoint's {spec.max_model_len}; give at most that")
    return asked
