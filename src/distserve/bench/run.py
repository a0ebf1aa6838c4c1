"""`distserve bench`: looks at the server, offers the workload once per rate, tells what came of it."""

from __future__ import annotations

import asyncio
import gc
import io
import math
import resource
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import uvloop
from rich.console import Console

from distserve import metrics
from distserve.bench import server as servers
from distserve.bench import show
from distserve.bench.client import Client, Result
from distserve.bench.load import Load, Run, lateness
from distserve.bench.options import BenchOptions
from distserve.errors import UsageError
from distserve.metrics import Report
from distserve.outputs import check_writable, write_json, write_text
from distserve.tables import show_report, show_sweep
from distserve.traces import Arrival
from distserve.workload import Workload

# The client itself spoils the figures from so late on at p99: seconds, and share of the median TTFT.
_LATE, _LATE_SHARE = 0.010, 0.05


@dataclass(slots=True)
class Outcome:
    """One run at one rate, told."""

    run: Run
    report: Report
    warnings: list[str]


def run(options: BenchOptions) -> int:
    """The whole command; returns the exit status."""
    workload = Workload.load(options.workload)
    if options.scale:
        workload = workload.scaled(options.scale[0], options.scale[-1])
    _check(options, workload)
    runs = [_draw(options, workload, rate) for rate in options.rates or (None,)]
    _raise_file_limit()
    gc.collect()
    gc.freeze()  # a collection that walks the whole workload would stop the clock-reader for milliseconds
    bench = _Bench(options, workload, runs)
    try:
        uvloop.run(bench.go())
    except servers.NoServerError as error:
        print(f"distserve: error: {error}", file=sys.stderr)
        return 1
    except asyncio.CancelledError:
        return 130
    return bench.tell()


def _check(options: BenchOptions, workload: Workload) -> None:
    """Refuses before any load what would only fail after it."""
    if not options.rates and not workload.timed:
        raise UsageError(f"{workload.name} has no arrival times: give --rate R (requests a second)")
    check_writable("--requests-out", options.requests_out)
    check_writable("--json", options.json_out)


def _draw(options: BenchOptions, workload: Workload, rate: float | None) -> Workload:
    """The requests of one run."""
    if rate is not None:
        number = options.requests or max(100, math.ceil(60 * rate))
        workload = workload.draw(rate, number, seed=options.seed, cv=options.cv)
    elif options.requests is not None:
        workload = workload.head(options.requests)
    if options.warmup is not None and options.warmup > workload.span:
        span = workload.span
        raise UsageError(
            f"--warmup {options.warmup:g} is longer than the arrivals, {span:g} s: lower it, or offer more"
        )
    return workload if options.context is None else workload.clipped(options.context)


def _raise_file_limit() -> None:
    """A connection is an open file; the usual 1,024 are soon in flight."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class _Bench:
    """The runs of one command."""

    def __init__(self, options: BenchOptions, workload: Workload, runs: list[Workload]) -> None:
        self._options = options
        self._runs = runs
        self._workload = workload
        self._server = servers.Server(options.model, None)
        self._outcomes: list[Outcome] = []
        self._interrupted = False
        self._dead = False
        self._load: Load | None = None
        self._task: asyncio.Task[None] | None = None

    async def go(self) -> None:
        options = self._options
        self._task = asyncio.current_task()
        with _interrupts(self._stop):
            async with Client(options.url, api_key=options.api_key, timeout=options.timeout) as client:
                self._server = await servers.look(client, options.model)
                chat = options.endpoint == "chat"
                prompts = await servers.learn(client, self._server, chat=chat, kind=options.prompts, seed=options.seed)
                for drawn in self._runs:
                    await self._one(client, prompts, drawn)
                    if self._interrupted:
                        break
                    self._dead = not await servers.alive(client)
                    if self._dead:
                        break

    def _stop(self) -> None:
        self._interrupted = True
        if self._load is not None:
            self._load.stop()
        elif self._task is not None:
            self._task.cancel()  # still asking the server about itself

    async def _one(self, client: Client, prompts: servers.Prompts, drawn: Workload) -> None:
        options = self._options
        if options.context is None and self._server.context is not None:
            drawn = drawn.clipped(self._server.context)
        bodies: dict[int, bytes] = {}

        def prepare(number: int, request: Arrival) -> None:
            bodies[number] = self._body(prompts, number, request)

        def send(number: int, request: Arrival, due: float) -> Awaitable[Result]:
            return client.send(self._path, bodies.pop(number), request, due)

        warmup = options.warmup
        if warmup is None:
            warmup = metrics.default_warmup(drawn.span) if drawn.rate is not None else 0.0
        self._load = Load(drawn.arrivals, send, prepare)
        with show.live(self._load, options.targets, self._title(drawn)):
            run = await self._load.go()
        if run.results:
            self._outcomes.append(self._outcome(run, drawn, prompts, warmup))

    @property
    def _path(self) -> str:
        return "/v1/chat/completions" if self._options.endpoint == "chat" else "/v1/completions"

    def _body(self, prompts: servers.Prompts, number: int, request: Arrival) -> bytes:
        body: dict[str, Any] = {
            "max_tokens": request.output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **prompts.make(number, request.prompt_tokens),
        }
        if self._server.model is not None:
            body["model"] = self._server.model
        if self._options.ignore_eos:
            body["ignore_eos"] = True
        return msgspec.json.encode(body)

    def _title(self, drawn: Workload) -> str:
        pace = f"at {drawn.rate:g} requests/s" if drawn.rate is not None else "replayed"
        return f"{drawn.name} {pace} on {self._options.url}" + (
            f" ({self._server.model})" if self._server.model else ""
        )

    def _outcome(self, run: Run, drawn: Workload, prompts: servers.Prompts, warmup: float) -> Outcome:
        options = self._options
        records = run.records
        warnings = [*drawn.notes, *([prompts.note] if prompts.note else []), *_warnings(run, options)]
        if max(record.arrival for record in records) - run.origin < warmup:
            warmup = 0.0
            warnings.append("stopped within the warm-up: every request counts")
        report = metrics.report(
            records,
            options.targets,
            end=run.end,
            rate=drawn.rate,
            devices=options.devices,
            warmup=warmup,
            seed=options.seed if drawn.rate is not None else None,
        )
        return Outcome(run, report, warnings)

    def tell(self) -> int:
        """Prints and writes what was measured; returns the exit status."""
        options = self._options
        if not self._outcomes:
            show.say("stopped before any request was over: nothing was measured")
            return 130
        console = Console(stderr=options.json_out == "-", soft_wrap=True)
        for outcome in self._outcomes:
            for warning in outcome.warnings:
                show.say(f"warning: {warning}")
            show_report(outcome.report, self._named(outcome), options.goal, console)
        goal = options.goal if options.goal is not None else 0.9
        goodput = _goodput([outcome.report for outcome in self._outcomes], goal)
        if len(options.rates) > 1:
            show_sweep([outcome.report for outcome in self._outcomes], goodput, goal, console)
        self._write(goal, goodput)
        if self._interrupted:
            return 130
        if self._dead:
            show.say("error: the server no longer answers")
            return 1
        attained = goodput > 0 if len(options.rates) > 1 else self._outcomes[0].report.attainment.joint >= goal
        none = not any(outcome.report.completed for outcome in self._outcomes)
        return 1 if none or (options.goal is not None and not attained) else 0

    def _named(self, outcome: Outcome) -> str:
        rate = outcome.report.rate if self._options.rates else None
        return self._title(replace(self._workload, rate=rate))

    def _write(self, goal: float, goodput: float) -> None:
        options = self._options
        if options.requests_out is not None:
            text = io.StringIO()
            metrics.write_requests(sorted(self._outcomes[0].run.records, key=lambda record: record.arrival), text)
            write_text(options.requests_out, text.getvalue())
        if options.json_out is not None:
            runs = [self._json(outcome) for outcome in self._outcomes]
            whole = runs[0] if len(options.rates) <= 1 else {"runs": runs, "goal": goal, "goodput": goodput}
            write_json(options.json_out, whole)

    def _json(self, outcome: Outcome) -> dict[str, Any]:
        options, run = self._options, outcome.run
        late, lag = lateness(run)
        return {
            **outcome.report.to_dict(),
            "workload": self._workload.name,
            "url": options.url,
            "model": self._server.model,
            "endpoint": options.endpoint,
            "interrupted": run.interrupted,
            "client": {"cpu": run.cpu / run.seconds if run.seconds else 0.0, "late_p99": late, "lag_p99": lag},
            "warnings": outcome.warnings,
        }


def _goodput(reports: list[Report], goal: float) -> float:
    """The highest rate up to which every rate of the sweep attains the goal; 0 where not even the lowest does."""
    best = 0.0
    for report in sorted(reports, key=lambda report: report.rate or 0.0):
        if report.attainment.joint < goal:
            break
        best = report.rate or 0.0
    return best


def _warnings(run: Run, options: BenchOptions) -> Iterator[str]:
    """What makes the figures say something else than they seem to."""
    good = [result for result in run.results if result.record.ok]
    messages: dict[str, str] = {}
    for result in run.results:
        if not result.record.ok:
            messages.setdefault(result.record.status, result.message)
    for status, message in messages.items():
        number = sum(result.record.status == status for result in run.results)
        yield f"{number} requests {status}, the first: {message}"
    if run.interrupted:
        yield f"stopped early: {run.in_flight} requests in flight were dropped and do not count"
    short = sum(result.record.output_tokens < result.asked.output_tokens for result in good)
    if short and options.ignore_eos:
        yield f"{short} answers were shorter than asked for: does the server know ignore_eos? is its context shorter?"
    uncounted = sum(result.counted_events for result in good)
    if uncounted:
        yield f"{uncounted} answers came without usage: their tokens are counted by events of the stream"
    off = [
        abs(result.record.prompt_tokens - result.asked.prompt_tokens) / result.asked.prompt_tokens for result in good
    ]
    if off and sum(off) / len(off) > 0.01:
        yield f"prompts are {sum(off) / len(off):.0%} off the workload's lengths: the server's own count is reported"
    late, lag = lateness(run)
    waits = sorted(result.record.ttft for result in good if result.record.ttft is not None)
    if max(late, lag) > max(_LATE, _LATE_SHARE * metrics.quantile(waits, 0.5) if waits else 0.0):
        yield (
            f"this client could not keep time: at p99 requests left {late * 1000:.0f} ms late and its loop lagged "
            f"{lag * 1000:.0f} ms, which latencies include; it used {run.cpu / run.seconds:.0%} of a core: give it one "
            "that the server does not use"
        )


@contextmanager
def _interrupts(stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM call `stop`; a second Ctrl-C is an ordinary KeyboardInterrupt."""
    loop = asyncio.get_running_loop()

    def first() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        stop()

    loop.add_signal_handler(signal.SIGINT, first)
    loop.add_signal_handler(signal.SIGTERM, stop)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        loop.remove_signal_handler(signal.SIGTERM)
