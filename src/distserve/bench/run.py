"""`distserve bench`: looks at the server, offers the workload at one rate, at several, or at those that a search asks
for, and tells what came of it."""

from __future__ import annotations

import asyncio
import gc
import math
import resource
import sys
from contextlib import suppress
from pathlib import Path

import uvloop

from distserve import metrics, plots
from distserve.bench import prompts as making
from distserve.bench import server as servers
from distserve.bench import show
from distserve.bench.client import Client
from distserve.bench.measure import Offer, Outcome, Until
from distserve.bench.options import BenchOptions
from distserve.bench.runner import Runner
from distserve.bench.search import Search, Step, Trial
from distserve.bench.tell import Told, tell
from distserve.errors import UsageError
from distserve.interrupts import interrupts
from distserve.outputs import check_writable
from distserve.workload import Workload

SPAN = 60.0  # seconds of a drawn run, unless told otherwise
LEAST = 100  # requests of it
MOST = 100_000  # requests that are drawn without being asked for by --requests
GOAL = 0.9  # joint attainment, unless told otherwise
_PAUSE = 1.0  # seconds after a run that was stopped, for the server to notice that nobody reads
_LONGEST_TEXT = 4_000_000  # characters of a file


def run(options: BenchOptions) -> int:
    """The whole command; returns the exit status."""
    workload = Workload.load(options.workload)
    if options.scale:
        workload = workload.scaled(options.scale[0], options.scale[-1])
    bench = _Bench(options, workload, _check(options, workload))
    _raise_file_limit()
    gc.collect()
    gc.freeze()  # a collection that walks the whole workload would stop the clock-reader for milliseconds
    try:
        with suppress(asyncio.CancelledError):  # Ctrl-C between two runs: what there is is told
            uvloop.run(bench.go())
    except servers.NoServerError as error:
        print(f"distserve: error: {error}", file=sys.stderr)
        return 1
    return tell(bench.told)


def _check(options: BenchOptions, workload: Workload) -> str | None:
    """Refuses before any load what would only fail after it; returns the text of --text."""
    if not options.rates and not options.find_goodput and not workload.timed:
        raise UsageError(f"{workload.name} has no arrival times: give --rate R (requests a second)")
    check_writable("--requests-out", options.requests_out)
    check_writable("--json", options.json_out)
    plots.check("--plot", options.plot)
    return _read(options.text) if options.text is not None else None


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"--text {path}: not a text file (UTF-8)") from None
    except OSError as error:
        raise UsageError(f"--text {path}: cannot be read: {error.strerror}") from None
    if not text.strip():
        raise UsageError(f"--text {path}: no words in it: name a file of real text")
    if len(text) > _LONGEST_TEXT:
        show.say(f"note: of {path} the first {_LONGEST_TEXT:,} characters are used")
    return text[:_LONGEST_TEXT]


def draw(options: BenchOptions, workload: Workload, rate: float | None) -> Offer:
    """What a run at `rate` offers; None: the file, replayed. Raises `UsageError`."""
    seed = None
    if rate is not None:
        seed = options.seed
        workload = workload.draw(rate, options.requests or usual(rate), seed=seed, cv=options.cv)
    elif options.requests is not None:
        workload = workload.head(options.requests)
    span = workload.span
    if options.warmup is not None and options.warmup > span:
        raise UsageError(
            f"--warmup {options.warmup:g} is longer than the arrivals, {span:g} s: lower it, or offer more"
        )
    warmup = options.warmup
    if warmup is None:
        warmup = metrics.default_warmup(span) if rate is not None else 0.0
    return Offer(workload, warmup, seed)


def draw_step(options: BenchOptions, workload: Workload, step: Step, goal: float) -> Offer:
    """What a search asks for: as many requests again stand behind those that are judged, to keep up the load."""
    seed = options.seed + step.repeat
    requests = math.ceil((options.requests or usual(step.rate)) * step.length)
    drawn = workload.draw(step.rate, 2 * requests, seed=seed, cv=options.cv)
    span = drawn.arrivals[requests - 1].arrival
    warmup = metrics.default_warmup(span) if options.warmup is None else min(options.warmup, span / 2)
    return Offer(drawn, warmup, seed, until=Until(requests, goal), length=step.length)


def usual(rate: float) -> int:
    """Requests of a run: a minute's worth."""
    return min(MOST, max(LEAST, math.ceil(SPAN * rate)))


def _raise_file_limit() -> None:
    """A connection is an open file; the usual 1,024 are soon in flight."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class _Bench:
    """The runs of one command."""

    def __init__(self, options: BenchOptions, workload: Workload, text: str | None) -> None:
        self._options = options
        self._workload = workload
        self._text = text
        goal = options.goal if options.goal is not None else GOAL
        self.told = Told(options, workload, goal)
        # drawn here, so that what is wrong with them is said before the server is asked anything
        self._offers = [] if options.find_goodput else [draw(options, workload, r) for r in options.rates or (None,)]
        self._runner: Runner | None = None
        self._task: asyncio.Task[None] | None = None

    async def go(self) -> None:
        options = self._options
        self._task = asyncio.current_task()
        with interrupts(self._stop):
            async with Client(options.url, api_key=options.api_key, timeout=options.timeout) as client:
                server = await servers.look(client, options.model)
                self.told.model = server.model
                prompts = await making.learn(
                    client, server, chat=options.endpoint == "chat", kind=options.prompts, seed=options.seed,
                    text=self._text,
                )  # fmt: skip
                self._runner = Runner(options, client, server, prompts)
                if options.find_goodput:
                    await self._search(client, self._runner)
                    return
                for number, offer in enumerate(self._offers, 1):
                    which = f"{number} of {len(self._offers)}: " if len(self._offers) > 1 else ""
                    if await self._one(client, self._runner, offer, which) is None:
                        return

    async def _one(self, client: Client, runner: Runner, offer: Offer, which: str) -> Outcome | None:
        """None: the bench ends here."""
        told = self.told
        outcome = await runner.one(offer, f"{which}{told.title(offer.workload)}", len(told.outcomes), told.outcomes)
        if outcome is not None:
            told.outcomes.append(outcome)
        if not told.interrupted:
            told.dead = not await servers.alive(client)
        return None if told.interrupted or told.dead else outcome

    async def _search(self, client: Client, runner: Runner) -> None:
        told, options = self.told, self._options
        told.search = search = Search(options.rates[0] if options.rates else 1.0, told.goal)
        while (step := search.next()) is not None:
            offer = draw_step(options, self._workload, step, told.goal)
            outcome = await self._one(client, runner, offer, f"run {len(search.trials) + 1}: ")
            if outcome is None:
                return
            met = tuple(map(options.targets.met, outcome.counted))
            search.tell(Trial(step.rate, met, outcome.growing, step.length, outcome.kept_up))
            if outcome.run.dropped:
                await asyncio.sleep(_PAUSE)

    def _stop(self) -> None:
        self.told.interrupted = True
        if self._runner is not None and self._runner.load is not None:
            self._runner.load.stop()
        elif self._task is not None:
            self._task.cancel()  # still asking the server about itself
