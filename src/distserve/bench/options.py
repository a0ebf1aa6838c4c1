"""What `distserve bench` was told, checked where it is born. Knows no server and no command line parser."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from distserve.errors import UsageError
from distserve.metrics import SLO

ENDPOINTS = ("completions", "chat")
PROMPTS = ("auto", "ids", "text")


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """A load and where to send it. Raises `UsageError` naming the option, its value and the cure."""

    url: str = "http://127.0.0.1:8000"  # of the server; without /v1 once checked
    workload: str = "sharegpt"
    rates: tuple[float, ...] = ()  # requests a second, a run each; (): replay the file
    both_rates: bool = False  # --rate and --rates were both given
    find_goodput: bool = False  # search for the highest rate that attains the goal; `rates` is where to begin
    cv: float = 1.0  # of the gaps; 1: Poisson, 0: fixed
    requests: int | None = None  # of each run; None: a minute's worth, or the whole file
    seed: int = 0
    slo: SLO | str | None = None
    goal: float | None = None  # least joint attainment
    warmup: float | None = None  # seconds; None: a tenth of a drawn run
    model: str | None = None
    endpoint: str = "completions"
    prompts: str = "auto"
    text: Path | None = None  # what prompts are cut from; None: they are random
    api_key: str | None = None
    ignore_eos: bool = True
    scale: tuple[float, ...] = ()  # factors of prompt and answer lengths
    context: int | None = None  # tokens; None: as the server says
    timeout: float = 600.0  # seconds
    devices: int | None = None
    json_out: str | None = None
    requests_out: Path | None = None
    plot: Path | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", _server(self.url))
        if not isinstance(self.slo, SLO):
            object.__setattr__(self, "slo", SLO.parse(self.slo) if self.slo is not None else SLO())
        if self.both_rates:
            raise UsageError("--rate and --rates are both given: --rate is one run, --rates several; keep one")
        for value, known, name in ((self.endpoint, ENDPOINTS, "--endpoint"), (self.prompts, PROMPTS, "--prompts")):
            if value not in known:
                raise UsageError(f"{name} {value} is unknown: one of {', '.join(known)}")
        if self.endpoint == "chat" and self.prompts == "ids":
            raise UsageError("--prompts ids needs --endpoint completions: a chat message is text")
        for name, number in (("--requests", self.requests), ("--devices", self.devices)):
            if number is not None and number < 1:
                raise UsageError(f"{name} {number} is too small: at least 1")
        for rate in self.rates:
            if not (math.isfinite(rate) and rate > 0):
                raise UsageError(f"the rate {rate:g} must be above 0 requests a second")
        if self.goal is not None and not 0 < self.goal <= 1:
            raise UsageError(f"--goal {self.goal:g} must be a share above 0 and at most 1, such as 0.9")
        if self.warmup is not None and not (math.isfinite(self.warmup) and self.warmup >= 0):
            raise UsageError(f"--warmup {self.warmup:g} must be 0 seconds or more")
        if not (math.isfinite(self.timeout) and self.timeout > 0):
            raise UsageError(f"--timeout {self.timeout:g} must be above 0 seconds")
        if self.context is not None and self.context < 2:
            raise UsageError(f"--context {self.context} must be at least 2 tokens (one of prompt, one of answer)")
        if len(self.scale) > 2:
            raise UsageError("--scale takes one factor, or two: prompts,answers")
        if self.find_goodput and len(self.rates) > 1:
            raise UsageError("--rates and --find-goodput are both given: the search chooses its rates; keep one")
        if self.find_goodput and self.slo == SLO():
            raise UsageError("--find-goodput needs targets: give --slo ttft=..,tpot=.. (seconds)")

    @property
    def targets(self) -> SLO:
        assert isinstance(self.slo, SLO)
        return self.slo


def parse_numbers(option: str, text: str) -> tuple[float, ...]:
    """`1,2.5` as numbers. Raises `UsageError`."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text!r}: write numbers with commas between them, such as 1,2,4") from None


def _server(url: str) -> str:
    """The server's address without a trailing /v1."""
    full = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(full)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise UsageError(f"--url {url!r} is no address of a server: such as http://127.0.0.1:8000")
    return full.rstrip("/").removesuffix("/v1").rstrip("/")
