"""Decides where a request goes and whether it is let in at all. Knows names and numbers, no connection and no clock.

An instance reports its load now and then. Between two reports the router counts what it sent there itself, so that a
burst is spread although nobody has reported it yet:

    pick_* --> what was picked counts as sent there --> a new `Load` of it comes --> sent = 0, the report is the truth
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from distserve.sched.base import Load
from distserve.sched.policy import AdmissionPolicy

NOMINAL = 1000.0  # tokens per second of an instance that nobody has measured yet; among equals only ratios matter


@dataclass(frozen=True, slots=True)
class Candidate:
    """An instance that is alive and has the role that is asked for."""

    name: str
    load: Load  # its last report; a new report is a new object
    tokens_per_second: float = NOMINAL  # prompt tokens it computes in a second, measured


@dataclass(frozen=True, slots=True)
class Admission:
    """Let in, or refused: then `retry_after` is the seconds until it would be let in, and `reason` the limit it met."""

    retry_after: float | None = None
    reason: str = ""


@dataclass(slots=True)
class _Sent:
    """What an instance was sent since its last report."""

    report: Load
    num_requests: int = 0
    num_tokens: int = 0
    num_blocks: int = 0


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

        def cost(candidate: Candidate) -> tuple[float, int]:
            return self.wait(candidate), self._num_requests(candidate)

        return self._pick("prefill", num_tokens, candidates, cost)

    def pick_decode(self, num_tokens: int, candidates: Iterable[Candidate]) -> str | None:
        """The instance with the most KV memory left when all that it was promised has come, then the one with the
        fewest requests. None: there is none. One without room is picked too: the KV then waits at its source."""

        def cost(candidate: Candidate) -> tuple[float, int]:
            return -self._num_unpromised_blocks(candidate), self._num_requests(candidate)

        return self._pick("decode", num_tokens, candidates, cost)

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
                seconds = excess / sum(candidate.tokens_per_second for candidate in known)
                refusals.append((seconds, f"{num_queued} prompt tokens wait, the limit is {policy.max_queued_tokens}"))
        excess = num_requests + 1 - policy.max_requests
        if excess > 0:  # Little's law: num_requests / mean_seconds of them end in a second
            seconds = excess * mean_seconds / num_requests
            refusals.append((seconds, f"{num_requests} requests are being served, the limit is {policy.max_requests}"))
        return Admission(*max(refusals)) if refusals else Admission()

    def _pick(
        self,
        phase: str,
        num_tokens: int,
        candidates: Iterable[Candidate],
        cost: Callable[[Candidate], tuple[float, int]],
    ) -> str | None:
        costs = [(cost(candidate), candidate) for candidate in candidates]
        if not costs:
            return None
        least = min(value for value, _ in costs)
        equals = sorted((candidate for value, candidate in costs if value == least), key=lambda equal: equal.name)
        last = self._last.get(phase, "")
        picked = next((equal for equal in equals if equal.name > last), equals[0])
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
