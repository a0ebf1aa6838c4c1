"""Decides where a request goes and whether it is let in at all. Knows names and numbers, no connection and no clock.

An instance reports its load now and then. Between two reports the router counts what it sent there itself, so that a
burst is spread although nobody has reported it yet:

    pick_* --> what was picked counts as sent there --> a new `Load` of it comes --> sent = 0, the report is the truth
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from distserve.sched.base import Load
from distserve.sched.policy import AdmissionPolicy

NOMINAL = 1000.0  # tokens per second of an instance that nobody has measured yet; among equals only ratios matter


class Candidate:
    """An instance that is alive and has the role that is asked for.

    load                its last report; a new report is a new object
    tokens_per_second   prompt tokens it computes in a second, measured
    """

    __slots__ = ("load", "name", "tokens_per_second")

    def __init__(self, name: str, load: Load, tokens_per_second: float = NOMINAL) -> None:
        self.name = name
        self.load = load
        self.tokens_per_second = tokens_per_second


@dataclass(frozen=True, slots=True)
class Admission:
    """Let in, or refused: then `retry_after` is the seconds until it would be let in, and `reason` the limit it met."""

    retry_after: float | None = None
    reason: str = ""


class _Sent:
    """What an instance was sent since its last report."""

    __slots__ = ("num_blocks", "num_requests", "num_tokens", "report")

    def __init__(self, report: Load) -> None:
        self.report = report
        self.num_requests = 0
        self.num_tokens = 0
        self.num_blocks = 0


class _Choice:
    """The candidate of least cost so far, then of fewest requests; of equals the one whose turn it is, by name."""

    __slots__ = ("best", "cost", "last", "requests")

    def __init__(self, last: str) -> None:
        self.last = last  # was chosen the time before
        self.best: Candidate | None = None
        self.cost = 0.0
        self.requests = 0

    def see(self, candidate: Candidate, cost: float, requests: int) -> None:
        best = self.best
        if best is not None:
            if cost > self.cost or (cost == self.cost and requests > self.requests):
                return
            if cost == self.cost and requests == self.requests and not self._sooner(candidate.name, best.name):
                return
        self.best, self.cost, self.requests = candidate, cost, requests

    def _sooner(self, name: str, other: str) -> bool:
        after, other_after = name > self.last, other > self.last
        return name < other if after == other_after else after


class Router:
    """Chooses among candidates; the caller says who is one. Ties are broken in turn, by name, so that equal instances
    get equal shares."""

    def __init__(self, policy: AdmissionPolicy | None = None) -> None:
        self.policy = policy or AdmissionPolicy()
        self._sent: dict[str, _Sent] = {}
        self._last: dict[str, str] = {}  # by phase: the instance that was picked last

    def pick_prefill(self, num_tokens: int, candidates: Iterable[Candidate]) -> str | None:
        """The instance (prefill or colocated) with the shortest predicted wait for `num_tokens` tokens, then the one
        with the fewest requests. None: there is none."""
        choice = _Choice(self._last.get("prefill", ""))
        for candidate in candidates:
            choice.see(candidate, self.wait(candidate), self._num_requests(candidate))
        return self._send("prefill", choice.best, num_tokens)

    def pick_decode(self, num_tokens: int, candidates: Iterable[Candidate]) -> str | None:
        """The instance with the most KV memory left when all that it was promised has come, then the one with the
        fewest requests. None: there is none. One without room is picked too: the KV then waits at its source."""
        choice = _Choice(self._last.get("decode", ""))
        for candidate in candidates:
            choice.see(candidate, -self._num_unpromised_blocks(candidate), self._num_requests(candidate))
        return self._send("decode", choice.best, num_tokens)

    def wait(self, candidate: Candidate) -> float:
        """Seconds until a prompt sent there now would have its turn."""
        return self._num_queued_tokens(candidate) / candidate.tokens_per_second

    def admit(
        self, num_tokens: int, candidates: Iterable[Candidate], *, num_requests: int, mean_seconds: float
    ) -> Admission:
        """Whether a prompt of `num_tokens` may join what waits for `candidates`, the instances that can compute it.

        `num_requests` are admitted and not over; each takes `mean_seconds` (measured) from admission to its end. Where
        it passes several limits, the one that takes longest decides. A prompt above `max_queued_tokens` is let in when
        nothing else is queued, or it never would be. Without candidates nothing is predicted, and only the number of
        requests counts.
        """
        policy = self.policy
        refusals: list[tuple[float, str]] = []
        known = list(candidates)
        if known:
            wait = min(self.wait(candidate) for candidate in known)
            if wait > policy.max_wait:
                refusals.append(
                    (wait - policy.max_wait, f"prompts wait {wait:.1f} s, the limit is {policy.max_wait:g}")
                )
            num_queued = sum(self._num_queued_tokens(candidate) for candidate in known)
            excess = min(num_queued, num_queued + num_tokens - policy.max_queued_tokens)
            if excess > 0:
                seconds = excess / sum([candidate.tokens_per_second for candidate in known], 0.0)
                refusals.append((seconds, f"{num_queued} prompt tokens wait, the limit is {policy.max_queued_tokens}"))
        excess = num_requests + 1 - policy.max_requests
        if excess > 0:  # Little's law: num_requests / mean_seconds of them end in a second
            seconds = excess * mean_seconds / num_requests
            refusals.append((seconds, f"{num_requests} requests are being served, the limit is {policy.max_requests}"))
        return Admission(*max(refusals)) if refusals else Admission()

    def _send(self, phase: str, picked: Candidate | None, num_tokens: int) -> str | None:
        """Counts it as sent there."""
        if picked is None:
            return None
        self._last[phase] = picked.name
        sent = self._sent_to(picked)
        sent.num_requests += 1
        sent.num_tokens += num_tokens
        sent.num_blocks += -(-num_tokens // picked.load.block_size)
        return picked.name

    def _sent_to(self, candidate: Candidate) -> _Sent:
        sent = self._sent.get(candidate.name)
        if sent is None or sent.report is not candidate.load:
            sent = self._sent[candidate.name] = _Sent(candidate.load)
        return sent

    def _num_requests(self, candidate: Candidate) -> int:
        load = candidate.load
        return load.num_running + load.num_queued + self._sent_to(candidate).num_requests

    def _num_queued_tokens(self, candidate: Candidate) -> int:
        return candidate.load.num_queued_tokens + self._sent_to(candidate).num_tokens

    def _num_unpromised_blocks(self, candidate: Candidate) -> int:
        """Free blocks less those of what waits for them; below 0 where more waits than fits. A queued sequence takes
        half a block more than its tokens fill, on average."""
        load = candidate.load
        queued = load.num_queued_tokens // load.block_size + (load.num_queued + 1) // 2
        return load.num_free_blocks - queued - self._sent_to(candidate).num_blocks
