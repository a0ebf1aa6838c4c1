"""The live side: a server for each plan, as a child process or where a person says it runs, and the cells' requests
through it by the client of `distserve bench`. Knows no prediction.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import aiohttp

from distserve import metrics
from distserve.bench import prompts as making
from distserve.bench import server as servers
from distserve.bench.client import Client, clock
from distserve.bench.load import lateness, sent_share
from distserve.bench.measure import Offer, Outcome
from distserve.bench.options import BenchOptions
from distserve.bench.runner import Runner
from distserve.errors import DistserveError
from distserve.plan import Plan
from distserve.profiler.live import Server
from distserve.validate import others
from distserve.validate.record import Key, Measured
from distserve.validate.steps import FLUSHED, StepFiles, Steps
from distserve.workload import Workload

# Requests, and requests/s, before anything counts: the first touch of memory and of code is slow.
_WARM_UP, _WARM_UP_RATE = 8, 8.0
_SAMPLE = re.compile(r"^(?P<name>[a-z_:]+)_(?P<part>sum|count)(?:\{(?P<labels>[^}]*)\})? (?P<value>\S+)$", re.MULTILINE)
_ROLE = re.compile(r'(?:role|phase)="([a-z]+)"')
# What tells where time went, of the server's histograms (docs/reference/metrics.md).
_TOLD = (
    "distserve:step_seconds",
    "distserve:phase_queue_seconds",
    "distserve:phase_first_token_seconds",
    "distserve:publish_seconds",
    "distserve:pull_seconds",
    "vllm:iteration_tokens_total",
    "vllm:time_to_first_token_seconds",
    "vllm:request_time_per_output_token_seconds",
)


class ServerDied(DistserveError):
    """In the middle of a cell; the message tells how many of its requests that concerns."""


class Site:
    """One running server."""

    def __init__(
        self, client: Client, runner: Runner, session: int | None = None, files: StepFiles | None = None
    ) -> None:
        self._client = client
        self._runner = runner
        self._session = session  # of the server's processes; None: not known
        self._files = files  # of its steps; None: it tells of none
        self._salt = 0

    async def warm_up(self, workload: Workload) -> None:
        await self._run(workload.draw(_WARM_UP_RATE, _WARM_UP, cv=0).scaled(1.0, 0.25), 0.0, "warming up")

    async def measure(self, key: Key, workload: Workload, title: str) -> Measured | None:
        """A whole run; None: it was stopped. Raises `ServerDied`."""
        before, clocks = await self._scrape(), others.look(self._session)
        outcome = await self._run(workload, metrics.default_warmup(workload.span), title, key.seed)
        if outcome is None or outcome.run.interrupted:
            return None
        if not await servers.alive(self._client):
            failed = sum(not record.ok for record in outcome.records)
            raise ServerDied(f"the server died in the middle of {key}: {failed} of {len(workload)} requests failed")
        after, meanwhile = await self._scrape(), others.between(clocks, others.look(self._session))
        measured = _measured(key, outcome, {name: after[name] - before.get(name, 0.0) for name in after}, meanwhile)
        return replace(measured, steps=await self._steps(outcome.run.start))

    async def _steps(self, start: float) -> Steps:
        if self._files is None:
            return {}
        await asyncio.sleep(FLUSHED)
        return self._files.since(start - clock() + time.monotonic())  # the server's steps are on the latter

    async def _run(self, workload: Workload, warmup: float, title: str, seed: int | None = None) -> Outcome | None:
        self._salt += 1
        return await self._runner.one(Offer(workload, warmup, seed), title, self._salt, ())

    async def _scrape(self) -> dict[str, float]:
        """{} of a server that has no such metrics."""
        try:
            async with self._client.session.get(f"{self._client.url}/metrics", timeout=servers.PROBE_TIMEOUT) as answer:
                return parse(await answer.text()) if answer.status == 200 else {}
        except (aiohttp.ClientError, ConnectionError, TimeoutError):
            return {}


def parse(text: str) -> dict[str, float]:
    """Sums and counts of the histograms that tell where time went, by name, role and part, over all instances."""
    found: dict[str, float] = {}
    for sample in _SAMPLE.finditer(text):
        if sample["name"] in _TOLD:
            role = _ROLE.search(sample["labels"] or "")
            name = f"{sample['name']}{f' {role[1]}' if role else ''} {sample['part']}"
            found[name] = found.get(name, 0.0) + float(sample["value"])
    return found


def _measured(key: Key, outcome: Outcome, server: dict[str, float], meanwhile: dict[str, float]) -> Measured:
    run = outcome.run
    late, lag = lateness(run)
    client = {
        "cpu": run.cpu / run.seconds if run.seconds else 0.0,
        "late_p99": late,
        "lag_p99": lag,
        "sent_share": sent_share(run),
        **meanwhile,
    }
    return Measured(
        key,
        outcome.report.warmup,
        run.end,
        tuple(outcome.records),
        client,
        outcome.bottleneck if not outcome.kept_up else "",
        {name: value for name, value in server.items() if not math.isnan(value)},
        tuple(outcome.warnings),
    )


@asynccontextmanager
async def site(plan: Plan, *, url: str | None, seed: int) -> AsyncIterator[Site]:
    """A server with this plan that is ready. Raises `ServerFailed` or `NoServerError` where there is none."""
    async with AsyncExitStack() as stack:
        if url is None:
            folder = stack.enter_context(TemporaryDirectory(prefix="distserve-"))
            file = Path(folder) / "plan.toml"
            file.write_text(plan.to_toml(), encoding="utf-8")
            steps = Path(folder) / "steps"
            arguments = ["--plan", str(file), "--log-level", "warning", "--record-steps", str(steps)]
            child = await stack.enter_async_context(Server(arguments))
            await child.ready()
            yield await connected(stack, child.url, seed, session=child.pid, files=StepFiles(steps))
            return
        yield await connected(stack, url, seed)


async def connected(
    stack: AsyncExitStack, url: str, seed: int, session: int | None = None, files: StepFiles | None = None
) -> Site:
    """To any OpenAI server; `session` and `files` of its processes where they are ours. Raises `NoServerError`."""
    options = BenchOptions(url=url, seed=seed)
    client = await stack.enter_async_context(Client(options.url, api_key=None, timeout=options.timeout))
    server = await servers.look(client, None)
    prompts = await making.learn(client, server, chat=False, kind="auto", seed=seed)
    return Site(client, Runner(options, client, server, prompts), session, files)


def seconds_of(cells: Sequence[Key], duration: float, requests: int | None) -> float:
    """How long these take, about: arrivals, the last answers, and a server's start for each plan."""
    spans = sum(duration if requests is None else requests / key.rate for key in cells)
    starts = 1 + sum(a.plan != b.plan for a, b in itertools.pairwise(cells))
    return spans + 6.0 * len(cells) + 12.0 * starts if cells else 0.0
