"""A request as the engine knows it: its tokens, and what sampling derives from them. No tensors."""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from distserve.errors import RequestError
from distserve.request import Logprobs, Request

Ids = NDArray[np.int64]


class RequestState:
    """Tokens known so far, and the sampler's tables. `request.output` grows by one with each `append`."""

    def __init__(self, request: Request, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        sampling = request.sampling
        self.request = request
        self.tokens = [*request.prompt, *request.output]
        _check("prompt", request.prompt, vocab_size)
        _check("logit_bias", [token for token, _ in sampling.logit_bias], vocab_size)
        _check("stop_token_ids", sampling.stop_token_ids, vocab_size)

        self.stops = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos_token_ids)}
        self.stop_ids: Ids = np.array(sorted(self.stops), dtype=np.int64)
        self.bias_ids: Ids = np.array([token for token, _ in sampling.logit_bias], dtype=np.int64)
        self.bias = np.array([value for _, value in sampling.logit_bias], dtype=np.float32)
        self.penalizes_output = bool(sampling.presence_penalty or sampling.frequency_penalty)
        self.penalizes_all = sampling.repetition_penalty != 1.0
        self._counts: Counter[int] = Counter(request.output)
        self._prompt_ids: Ids = np.unique(np.array(request.prompt if self.penalizes_all else [], dtype=np.int64))
        wanted = sampling.prompt_logprobs is not None and not request.output
        self.prompt_logprobs: list[Logprobs | None] | None = [None] * len(request.prompt) if wanted else None

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of its prompt are still wanted."""
        return self.prompt_logprobs is not None and not self.request.output

    @property
    def is_adjusted(self) -> bool:
        """Whether the next token is drawn from other logits than the model's."""
        return bool(self.penalizes_output or self.penalizes_all or len(self.bias) or self.must_go_on)

    @property
    def must_go_on(self) -> bool:
        """Whether the next token may not end the request."""
        return len(self.request.output) < self.request.sampling.min_tokens and bool(self.stops)

    def output_counts(self) -> tuple[Ids, NDArray[np.float32]]:
        """(distinct generated tokens, how often each was generated)."""
        size = len(self._counts)
        ids = np.fromiter(self._counts.keys(), dtype=np.int64, count=size)
        return ids, np.fromiter(self._counts.values(), dtype=np.float32, count=size)

    def seen_ids(self) -> Ids:
        """Distinct tokens of the prompt and of what was generated."""
        return np.union1d(self._prompt_ids, np.fromiter(self._counts, dtype=np.int64, count=len(self._counts)))

    def append(self, token: int) -> None:
        self.tokens.append(token)
        self.request.output.append(token)
        self._counts[token] += 1


def _check(param: str, ids: list[int] | tuple[int, ...], vocab_size: int) -> None:
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        raise RequestError(f"{param} names token {wrong}; the model's tokens are 0 to {vocab_size - 1}", param=param)
