"""The contenders' servers that are up: one of each, so that all can be measured directly behind one another. One that
is asked for with another plan is started anew.

vLLM's processes look for work without a pause, so they are stopped (SIGSTOP) while others are measured; ours sleep.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from types import TracebackType

from distserve.plan import Plan
from distserve.validate.live import Site
from distserve.workload import Workload
from experiments.live_goodput import peers
from experiments.live_goodput.contenders import Contender, serving


class Servers:
    """In a context, which ends them all."""

    def __init__(self, vllm_python: str | None) -> None:
        self._vllm_python = vllm_python
        self._all = AsyncExitStack()
        self._up: dict[str, tuple[Plan | None, Site, AsyncExitStack]] = {}
        self._warm: set[tuple[str, str]] = set()  # contenders and workloads

    async def __aenter__(self) -> Servers:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._all.aclose()

    def has(self, contender: Contender) -> bool:
        return contender.name in self._up and self._up[contender.name][0] == contender.plan

    async def ready(self, contender: Contender, workload: Workload) -> None:
        """Started, and warm for this workload. Raises `ServerFailed`, or `peers.Absent` of what is not installed."""
        if not self.has(contender):
            await self.end(contender)
            stack = AsyncExitStack()
            self._all.push_async_callback(stack.aclose)  # closing twice is closing once
            site = await stack.enter_async_context(serving(contender, self._vllm_python))
            self._up[contender.name] = contender.plan, site, stack
        if (contender.name, workload.name) not in self._warm:
            site = self._up[contender.name][1]
            with peers.awake(site):
                await site.warm_up(workload)
            self._warm.add((contender.name, workload.name))

    def of(self, contender: Contender) -> Site:
        """One that is ready."""
        return self._up[contender.name][1]

    async def end(self, contender: Contender) -> None:
        """Where it is up."""
        if contender.name in self._up:
            _, _, stack = self._up.pop(contender.name)
            self._warm = {(name, workload) for name, workload in self._warm if name != contender.name}
            await stack.aclose()
