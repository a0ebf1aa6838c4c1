"""What the logs of a run say about the engine behind it, without any simulation: who was where when, which prompts were
computed together, how long steps took. Seconds and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distserve.sim.life import Life
from experiments.accuracy.runs import Run

Floats = NDArray[np.float64]
TOGETHER = 0.005  # first tokens that come within this of the one before were computed in one step
LONG_ENOUGH = 5  # output tokens of a request that says something about the steps it went through


@dataclass(frozen=True)
class Spans:
    """When each request arrived, had its first token and its last, and its lengths; in order of arrival."""

    arrival: Floats
    first: Floats
    last: Floats
    prompt: Floats
    output: Floats

    @classmethod
    def real(cls, run: Run) -> Spans:
        arrival = np.array([r.arrival for r in run.records])
        first = arrival + np.array([r.ttft for r in run.records])
        return cls(arrival, first, arrival + np.array(run.latencies), *_lengths(run))

    @classmethod
    def imagined(cls, run: Run, lives: Sequence[Life]) -> Spans:
        arrival, first, last = (
            np.array([getattr(life, name) for life in lives]) for name in ("arrival", "first", "last")
        )
        return cls(arrival, first, last, *_lengths(run))

    def context(self, time: float) -> int:
        """KV tokens of what has its first token and not its last, wherever they are; answers grow evenly."""
        active = (self.first <= time) & (self.last > time)
        grown = np.clip((time - self.first) / np.maximum(self.last - self.first, 1e-9), 0, 1)
        return int((active * (self.prompt + grown * self.output)).sum())

    def active(self, time: float) -> int:
        """Requests that have their first token and not their last."""
        return int(((self.first <= time) & (self.last > time)).sum())

    def waiting(self, time: float) -> tuple[int, float]:
        """(requests without a first token, seconds that the oldest of them has waited)."""
        waits = time - self.arrival[(self.arrival <= time) & (self.first > time)]
        return len(waits), float(waits.max(initial=0.0))

    def prompt_steps(self) -> list[PromptStep]:
        """Steps that gave first tokens, in order of time."""
        order = np.argsort(self.first, kind="stable")
        groups: list[list[int]] = []
        for i in order:
            if groups and self.first[i] - self.first[groups[-1][-1]] < TOGETHER:
                groups[-1].append(int(i))
            else:
                groups.append([int(i)])
        found, before = [], -np.inf
        for group in groups:
            end = float(self.first[group[0]])
            known = float(self.arrival[group].max()) < before - 2 * TOGETHER
            lengths = tuple(int(self.prompt[i]) for i in group)
            found.append(PromptStep(lengths, end - before if known else None))
            before = float(self.first[group[-1]])
        return found


@dataclass(frozen=True, slots=True)
class PromptStep:
    """Prompts that were computed together."""

    lengths: tuple[int, ...]
    seconds: float | None  # since the prompt step before it; None: somebody in it was not known then

    @property
    def padding(self) -> int:
        """Tokens that fill all up to the longest."""
        return len(self.lengths) * max(self.lengths) - sum(self.lengths)


def _lengths(run: Run) -> tuple[Floats, Floats]:
    prompt, output = (
        np.array([getattr(r, name) for r in run.records], float) for name in ("prompt_tokens", "output_tokens")
    )
    return prompt, output


@dataclass(frozen=True)
class Pace:
    """What requests of a run spent between first and last token, and what they shared it with: for each of them (rows)
    the steps, steps x sequences and steps x context that it saw, and the prompt steps and prompt tokens between."""

    work: Floats  # [requests, 5]
    seconds: Floats
    middle: Floats  # time in the middle of each
    batch: Floats  # mean number of requests decoding beside it, itself included

    @classmethod
    def of(cls, spans: Spans) -> Pace:
        rows, seconds, middle, batch = [], [], [], []
        for i in np.flatnonzero(spans.output >= LONG_ENOUGH):
            first, last, steps = spans.first[i], spans.last[i], spans.output[i] - 1
            shared = (np.minimum(spans.last, last) - np.maximum(spans.first, first)).clip(0) / (last - first)
            context = (shared * (spans.prompt + spans.output / 2)).sum()
            between = (spans.first > first) & (spans.first <= last)
            rows.append([steps, steps * shared.sum(), steps * context, between.sum(), spans.prompt[between].sum()])
            seconds.append(last - first)
            middle.append((first + last) / 2)
            batch.append(shared.sum())
        return cls(np.array(rows, float), np.array(seconds), np.array(middle), np.array(batch))


def regress(paces: Sequence[Pace]) -> Floats:
    """[5] seconds a step, a sequence, a token of context, a prompt step and a prompt token: least squares on relative
    error over all requests of `paces`."""
    work = np.concatenate([pace.work / pace.seconds[:, None] for pace in paces])
    found: Floats = np.linalg.lstsq(work, np.ones(len(work)), rcond=None)[0]
    return found


def alone(steps: Sequence[PromptStep], seconds_at_most: float = 0.05) -> tuple[float, float]:
    """(seconds, seconds per token) of steps of one prompt that began when the prompt step before them ended: least
    squares over those that are at most so much above the line through all (other steps came between the rest)."""
    singles = [(step.lengths[0], step.seconds) for step in steps if len(step.lengths) == 1 and step.seconds is not None]
    tokens, seconds = (np.array(values, float) for values in zip(*singles, strict=True))
    for _ in range(2):
        slope, base = np.polyfit(tokens, seconds, 1)
        near = seconds - base - slope * tokens < seconds_at_most
        tokens, seconds = tokens[near], seconds[near]
    slope, base = np.polyfit(tokens, seconds, 1)
    return float(base), float(slope)
