"""What a user asked for: token ids and how to sample. Knows no scheduler, no tensor and no HTTP."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import msgspec

from distserve.errors import RequestError

MAX_LOGPROBS = 20  # OpenAI's limit on top_logprobs


class FinishReason(StrEnum):
    """Why a request ended. The first two are OpenAI's words and reach the client."""

    STOP = "stop"  # end-of-sequence token, stop token, or a stop string (found by the gateway)
    LENGTH = "length"  # max_tokens, or the model's context is full


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn from logits. Everything that a hand-off must carry to go on as if nothing had happened.

    There is no generator state to carry: token number `i` of a request draws one uniform number that depends only on
    `(seed, i)`, so any instance can go on from any token (`engine/sampler.py`).
    """

    max_tokens: int = 16
    min_tokens: int = 0  # end-of-sequence and stop tokens are impossible before this many
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    presence_penalty: float = 0.0  # over generated tokens
    frequency_penalty: float = 0.0  # over generated tokens
    repetition_penalty: float = 1.0  # over prompt and generated tokens
    seed: int = 0  # 64 bits; the gateway draws one where the user gave none, so that a retry repeats it
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None  # None: none; k: the drawn token's and the k likeliest tokens' log-probabilities
    prompt_logprobs: int | None = None  # the same for the prompt's own tokens

    def __post_init__(self) -> None:
        def check(ok: bool, param: str, limit: str) -> None:
            if not ok:
                raise RequestError(f"{param} must be {limit}, not {getattr(self, param)}", param=param)

        check(self.max_tokens >= 1, "max_tokens", "at least 1")
        check(self.min_tokens >= 0, "min_tokens", "at least 0")
        check(self.min_tokens <= self.max_tokens, "min_tokens", f"at most max_tokens ({self.max_tokens})")
        check(0 <= self.temperature <= 100, "temperature", "between 0 and 100")
        check(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        check(self.top_k >= -1, "top_k", "-1 (off), 0 (off) or at least 1")
        check(0 <= self.min_p <= 1, "min_p", "between 0 and 1")
        check(-2 <= self.presence_penalty <= 2, "presence_penalty", "between -2 and 2")
        check(-2 <= self.frequency_penalty <= 2, "frequency_penalty", "between -2 and 2")
        check(0 < self.repetition_penalty <= 100, "repetition_penalty", "above 0 and at most 100")
        for param in ("logprobs", "prompt_logprobs"):
            value = getattr(self, param)
            check(value is None or 0 <= value <= MAX_LOGPROBS, param, f"between 0 and {MAX_LOGPROBS}")

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5


class Logprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position, from the model's raw logits (before penalties and temperature)."""

    token: float  # of the token that stands there
    rank: int  # 1: it was the likeliest
    top: tuple[tuple[int, float], ...] = ()  # (token id, log-probability), likeliest first


class Token(msgspec.Struct, frozen=True, array_like=True):
    """One generated token on its way to the client. A struct, because it crosses process borders once a step."""

    id: int
    finish: FinishReason | None = None  # set on the last token of a request
    logprobs: Logprobs | None = None
    prompt_logprobs: tuple[Logprobs | None, ...] | None = None  # on the first token only, where asked for


@dataclass(slots=True)
class Request:
    """One prompt to be continued, and what has been generated so far. The gateway owns it; instances get copies."""

    id: int
    prompt: list[int]
    sampling: SamplingParams
    arrival: float = 0.0  # seconds on the gateway's monotonic clock
    attempt: int = 1  # only the gateway raises it; results of older attempts are dropped
    output: list[int] = field(default_factory=list)  # tokens given to the client (after a retry: part of the prompt)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.output)
