"""Turns a step into one pass of this rank's part of the model, and logits into tokens.

Knows neither who decided the step nor which thread it runs in.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from distserve.engine import sampler
from distserve.engine.base import EngineResult
from distserve.engine.kv_cache import KVCache
from distserve.engine.layers import StepLayout
from distserve.engine.models.base import Model
from distserve.engine.state import RequestState
from distserve.engine.step import StepInput

_LOGITS_ROWS = 32  # prompt log-probabilities: rows of logits in memory at a time (6 MB at a vocabulary of 49,152)
_WARM_UP_TOKENS = 64


class Runner:
    """Computes one rank's part of steps. Every rank of an instance is given the same steps in the same order; a stage's
    activations come from the stage before, and only the rank where logits come together answers anything. Not
    thread-safe."""

    def __init__(self, model: Model, kv: KVCache, max_model_len: int, device: torch.device) -> None:
        self._model = model
        self._kv = kv
        self._max_model_len = max_model_len
        self._device = device

    def run(self, step: StepInput, states: Mapping[int, RequestState]) -> EngineResult:
        """Writes KV of every scheduled token; samples for the sequences that are computed to their end. `states`: of
        the requests that are sampled or scored, where this rank samples."""
        began = time.perf_counter()
        with torch.inference_mode():
            result = self._run(step, states)
        result.seconds = time.perf_counter() - began
        return result

    def _run(self, step: StepInput, states: Mapping[int, RequestState]) -> EngineResult:
        result, hidden = EngineResult(), self._hidden(step)
        if hidden is None:
            return result
        first_scored = len(step.sampled)
        for request_id, first, number in step.scored:
            self._score(hidden[first_scored : first_scored + number], states.get(request_id), first)
            first_scored += number
        if step.sampled:
            logits = self._model.logits(hidden[: len(step.sampled)])
            if self._model.place.samples:
                self._sample(logits, [states[request_id] for request_id in step.sampled], result)
        return result

    def _sample(self, logits: Tensor, states: list[RequestState], result: EngineResult) -> None:
        for state, token in zip(states, sampler.sample(logits, states, self._max_model_len), strict=True):
            if token is None:
                result.failures[state.request.id] = sampler.NOT_FINITE
            else:
                result.tokens[state.request.id] = token

    def _hidden(self, step: StepInput) -> Tensor | None:
        """Final hidden states [R, C] of the step's rows; None before the last stage: what it computed is sent on."""
        model, count = self._model, len(step.ids)
        lens = (step.query_lens, step.context_lens)
        layout = StepLayout.build(*lens, step.block_tables, self._kv.layout.block_size, self._device)
        if model.place.is_first:
            residual = model.embed(torch.tensor(step.ids, dtype=torch.int32, device=self._device), layout)
        else:
            residual = model.links.receive((count, model.spec.hidden_size))
        if not model.place.is_last:
            model.links.send(model.blocks(residual, layout, self._kv.layers, None))
            return None
        # A chunk in the middle of a prompt needs no hidden state; one row keeps shapes ordinary.
        every = step.rows == list(range(count))
        wanted = None if every else torch.tensor(step.rows or [0], device=self._device)
        return model.final(model.blocks(residual, layout, self._kv.layers, wanted))

    def _score(self, hidden: Tensor, state: RequestState | None, first: int) -> None:
        """Log-probabilities of the prompt's tokens from number `first` on; `hidden` [n, C] are those before each."""
        for start in range(0, len(hidden), _LOGITS_ROWS):
            piece = hidden[start : start + _LOGITS_ROWS]
            logits = self._model.logits(piece)
            if self._model.place.samples:
                assert state is not None
                assert state.prompt_logprobs is not None
                where = slice(first + start, first + start + len(piece))
                num_top = state.request.sampling.prompt_logprobs or 0
                state.prompt_logprobs[where] = sampler.prompt_logprobs(logits, state.request.prompt[where], num_top)

    def warm_up(self) -> None:
        """A short prompt and one decode step through every layer, so that the first request does not pay for first
        uses. Writes to the first blocks, which nobody owns yet. All ranks of an instance do it together."""
        size = self._kv.layout.block_size
        length = min(_WARM_UP_TOKENS, self._kv.num_blocks * size, self._max_model_len)
        blocks = list(range(-(-length // size)))
        with torch.inference_mode():
            for count in (length, 1):
                step = StepInput([0] * count, [count], [length], [blocks], [count - 1], [], [])
                hidden = self._hidden(step)
                if hidden is not None:
                    self._model.logits(hidden)
