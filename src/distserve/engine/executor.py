"""The executor of one process and one device: loads a checkpoint, owns the KV pool, computes in a thread of its own.

Knows neither scheduler nor transport; whoever shares the KV injects the memory it lies in.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from distserve.engine import kernels
from distserve.engine.base import EngineOptions, EngineResult, Executor
from distserve.engine.kv_cache import Buffer, KVCache, private_buffer
from distserve.engine.loaded import LoadedModel, Progress, load
from distserve.engine.runner import Runner
from distserve.engine.state import RequestState
from distserve.engine.step import plan_step
from distserve.errors import PlanError
from distserve.request import Request
from distserve.sched.base import Batch
from distserve.sharding import Sharding
from distserve.specs import KVLayout, ModelSpec


class LocalExecutor(Executor):
    """See `base.Executor`. `kv_buffer_factory` is given a number of bytes and returns that much writable memory;
    `loaded` are weights that are here already. The fields below are set when `start` returns."""

    spec: ModelSpec
    layout: KVLayout
    sharding: Sharding
    kv_buffer: Buffer
    num_blocks: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    max_in_flight = 1

    def __init__(
        self,
        options: EngineOptions,
        kv_buffer_factory: Callable[[int], Buffer] | None = None,
        loaded: LoadedModel | None = None,
    ) -> None:
        self._options = options
        self._loaded = loaded
        self._buffer_factory = kv_buffer_factory or private_buffer
        self.block_size = options.block_size
        self._states: dict[int, RequestState] = {}
        # One thread: the event loop stays free while the device computes, and steps never overlap.
        self._thread = ThreadPoolExecutor(1, "engine")

    async def start(self, progress: Progress) -> None:
        loop = asyncio.get_running_loop()

        def tell(fraction: float, what: str) -> None:
            loop.call_soon_threadsafe(progress, fraction, what)

        if self._options.cores:
            # Pinned before the engine's thread exists: it and the kernels' threads inherit the cores.
            os.sched_setaffinity(0, self._options.cores)
        await loop.run_in_executor(self._thread, self._build, tell)

    def _build(self, progress: Progress) -> None:
        options = self._options
        if options.cores:
            kernels.set_num_threads(len(options.cores))
        loaded = self._loaded or load(options, progress)
        self.spec = loaded.spec
        self.layout = loaded.spec.kv_layout(options.block_size, loaded.dtype)
        self.sharding = Sharding(loaded.spec.num_kv_heads, (loaded.spec.num_layers,))
        self.num_blocks = options.kv_bytes // self.layout.block_bytes
        if self.num_blocks < 1:
            raise PlanError(
                f"{options.kv_bytes} bytes of KV memory hold no block of {options.block_size} tokens "
                f"({self.layout.block_bytes} bytes); give more KV memory or smaller blocks"
            )
        self.eos_token_ids = loaded.spec.eos_token_ids
        # A sequence that fills the whole KV memory ends there, as one that fills the context does.
        self.max_model_len = min(loaded.max_model_len, self.num_blocks * options.block_size)
        progress(0.9, "allocating KV memory")
        self.kv_buffer = self._buffer_factory(self.num_blocks * self.layout.block_bytes)
        self._kv = KVCache(self.layout, self.num_blocks, self.kv_buffer, loaded.device)
        self._runner = Runner(loaded.model, self._kv, self.max_model_len, loaded.device)
        progress(0.92, "warming up")
        self._runner.warm_up()
        progress(1.0, "ready")

    def add(self, request: Request) -> None:
        """Takes ownership of `request`; its `output` grows. Raises `RequestError` where it names unknown tokens."""
        self._states[request.id] = RequestState(request, self.spec.vocab_size, self.eos_token_ids)

    def launch(self, batch: Batch) -> asyncio.Future[EngineResult]:
        return asyncio.get_running_loop().run_in_executor(self._thread, self._run, batch)

    def _run(self, batch: Batch) -> EngineResult:
        return self._runner.run(plan_step(batch, self._states), self._states)

    def forget(self, request_id: int) -> None:
        self._states.pop(request_id, None)

    def export_blocks(self, blocks: list[int]) -> None:
        """Before others read `blocks` in `kv_buffer`."""
        self._kv.export_blocks(blocks)

    def import_blocks(self, blocks: list[int]) -> None:
        """After `blocks` were written in `kv_buffer`."""
        self._kv.import_blocks(blocks)

    async def stop(self) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)
        self._states.clear()
