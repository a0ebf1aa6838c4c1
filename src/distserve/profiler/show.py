"""What a person sees while a machine is measured, and what came of it. Only reads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from distserve.costs.base import Pace, Weather
from distserve.costs.profile import TRUSTED
from distserve.profiler.phases import Findings

WORDS = {
    "loading": "loading the model",
    "steps": "timing steps",
    "neighbours": "timing steps beside a neighbour's",
    "pulls": "timing KV pulls",
    "live": "asking a live server",
}
Tell = Callable[[str, float], None]  # (phase, seconds left at most)


def say(message: str) -> None:
    """A line of talk."""
    print(f"distserve: {message}", file=sys.stderr)


@contextmanager
def progress(title: str, seconds: float) -> Iterator[Tell]:
    """A bar on stderr where that is a terminal; else a line at each phase."""
    console = Console(stderr=True)
    if not console.is_terminal:
        said: set[str] = set()

        def once(phase: str, left: float) -> None:
            if phase not in said:
                said.add(phase)
                say(f"{WORDS[phase]} (at most {_clock(left)} left)")

        say(title)
        yield once
        return
    columns = TextColumn(title), BarColumn(bar_width=24), TextColumn("{task.description}")
    with Progress(*columns, console=console, transient=True, refresh_per_second=4) as bar:
        task = bar.add_task("", total=seconds)
        yield lambda phase, left: bar.update(
            task, completed=seconds - left, description=f"{WORDS[phase]}, at most {_clock(left)} left"
        )


def degree(tp: int, pp: int) -> str:
    """As costs files have what was measured of so many stages, and says nothing of other numbers of them."""
    return f"{tp}x{pp}"


def summary(found: Findings, table: Mapping[str, Any], knee: int, console: Console) -> None:
    """The figures that a person looks for first."""
    (by_degree,) = table["models"].values()
    (entry,) = by_degree.values()
    engine, machine = table["engine"], table["machine"]
    console.print(f"[bold]{machine['fingerprint']}[/bold]", highlight=False)
    rows = [("knee Lm", f"{knee} tokens")]
    rows += [(f"prompt {n}", _ms(found.prompts[n,].seconds)) for n in (128, knee, 2048) if (n,) in found.prompts and n]
    rows += [(f"decode {b} x {c}", _ms(series.seconds)) for (b, c), series in sorted(found.decodes.items()) if c == 128]
    if found.around.request:
        host = engine["decode_step"]
        rows.append(("around a step", f"{_ms(host['per_step'])}, and {1e6 * host['per_sequence']:.0f} us a stream"))
        rows.append(("a request", f"{_ms(engine['request'])} to its first token beside its step"))
    for what, key in (("publishing KV", "publish"), ("a pull", "pull")):
        if f"{key}_bandwidth" in engine:
            rows.append((what, f"{_ms(engine[key])}, and {engine[f'{key}_bandwidth'] / 1e9:.1f} GB/s"))
    for phase in ("prefill", "decode"):
        for neighbour, share in engine.get(f"{phase}_beside", {}).items():
            rows.append((f"{phase} | {neighbour}", f"{share:.2f} times as long beside a neighbour's {neighbour}"))
    if "weather" in table:
        weather = table["weather"]
        slow = Weather(tuple(Pace(*row) for row in weather["paces"]), weather["span"]).mean
        rows.append(("weather", f"prompts {slow[0]:.2f} times, decode steps {slow[1]:.2f} times as long in the mean"))
    for kind, error in entry["error"].items():
        mean = error.get("left_out_mean", error["mean"])
        if mean is not None:
            rows.append((f"{kind} error", f"{mean:.1%} mean, {error.get('left_out_max', error['max']):.1%} at worst"))
    for name, value in dict(rows).items():
        console.print(f"{name:<18}{value}", highlight=False)


def warnings(found: Findings, table: Mapping[str, Any]) -> list[str]:
    """What keeps these costs from being good, a sentence each."""
    (by_degree,) = table["models"].values()
    (entry,) = by_degree.values()
    said = [
        f"{kind} steps that the fit has not seen are missed by {mean:.0%} on average: measure again when the machine "
        "is quiet, or with more --time"
        for kind, error in entry["error"].items()
        if (mean := error.get("left_out_mean")) and mean > TRUSTED
    ]
    restless = [series for series in (*found.prompts.values(), *found.decodes.values()) if not series.settled]
    total = len(found.prompts) + len(found.decodes)
    if len(restless) > total / 10:
        said.append(
            f"{len(restless)} of {total} steps never settled: other work ran on this machine, or --time is too short"
        )
    return said


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
