"""Draws tokens from logits, and says which of them is a request's last. Knows no batch order and no scheduler.

A token is a function of its own row of logits, its request's history and `(seed, number of generated tokens)`: whatever
else is in the batch, wherever it runs and however often it is tried again.

    logits -> logit_bias -> min_tokens -> penalties -> argmax                                       (temperature 0)
                                                   `-> temperature -> min_p -> top_k -> top_p -> inverse CDF

Tokens are ordered by probability, equal ones by id; each filter keeps the head of that order.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distserve.engine.state import RequestState
from distserve.request import FinishReason, Logprobs, SamplingParams, Token

Row = NDArray[np.float32]  # [V]

# Candidates are first sought among tokens at least this likely relative to the likeliest; sorting all comes last.
_CUTOFFS = (1e-3, 0.0)

NOT_FINITE = (
    "no token can be drawn: the logits are not finite numbers (the checkpoint or its dtype is unfit for the prompt, "
    "or penalties, logit_bias and stop tokens leave nothing)"
)


def sample(logits: Tensor, states: Sequence[RequestState], max_model_len: int) -> list[Token | None]:
    """One token for each row of `logits` [R, V] (fp32), appended to its request. None: there is none (NOT_FINITE)."""
    likeliest, peaks = _argmax(logits)
    plain = [s.request.sampling.greedy and not s.is_adjusted and s.request.sampling.logprobs is None for s in states]
    rows = _host_rows(logits, [i for i, is_plain in enumerate(plain) if not is_plain])
    tokens: list[Token | None] = []
    for i, state in enumerate(states):
        token: int | None = None
        logprobs = None
        if np.isfinite(peaks[i]):
            token, logprobs = (int(likeliest[i]), None) if plain[i] else _choose(rows[i], state)
        tokens.append(None if token is None else _finish(state, token, logprobs, max_model_len))
    return tokens


def prompt_logprobs(logits: Tensor, tokens: Sequence[int], num_top: int) -> list[Logprobs]:
    """Of `tokens` [R], each following the row of `logits` [R, V] at its index."""
    rows = logits.float().cpu().numpy()
    return [_logprobs(row, token, num_top) for row, token in zip(rows, tokens, strict=True)]


def uniform(seed: int, index: int) -> float:
    """The number in [0, 1) that token `index` of a request is drawn with."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed & 0xFFFF_FFFF_FFFF_FFFF, index), digest_size=8).digest()
    return float(int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _argmax(logits: Tensor) -> tuple[NDArray[np.int64], Row]:
    """(first largest entry, its value) of each row. A row with a NaN has a NaN peak."""
    if logits.device.type == "cpu":
        table = logits.numpy()
        ids = table.argmax(axis=1)  # NumPy's takes the first of equals, and the first NaN
        return ids, table[np.arange(len(ids)), ids]
    peaks = logits.amax(dim=1)
    index = torch.arange(logits.shape[1], device=logits.device)
    first = torch.where(logits == peaks[:, None], index, logits.shape[1]).amin(dim=1)
    return first.cpu().numpy(), peaks.cpu().numpy()


def _host_rows(logits: Tensor, wanted: list[int]) -> dict[int, Row]:
    """Those rows as arrays; never to be written to (on a CPU they are the logits themselves)."""
    if not wanted:
        return {}
    if logits.device.type == "cpu":
        table = logits.numpy()
        return {i: table[i] for i in wanted}
    return dict(zip(wanted, logits[wanted].cpu().numpy(), strict=True))


def _choose(row: Row, state: RequestState) -> tuple[int | None, Logprobs | None]:
    sampling = state.request.sampling
    adjusted = _adjust(row, state) if state.is_adjusted else row
    if not np.isfinite(adjusted.max()):
        return None, None
    if sampling.greedy:
        token = int(adjusted.argmax())
    else:
        token = draw(adjusted, sampling, uniform(sampling.seed, len(state.request.output)))
    return token, None if sampling.logprobs is None else _logprobs(row, token, sampling.logprobs)


def _adjust(row: Row, state: RequestState) -> Row:
    """The logits after everything that depends on the request's history."""
    sampling = state.request.sampling
    row = row.copy()
    row[state.bias_ids] += state.bias
    if state.must_go_on:
        row[state.stop_ids] = -np.inf
    if state.penalizes_all:  # Keskar et al. 2019 (CTRL), section 4.1
        ids = state.seen_ids()
        values = row[ids]
        row[ids] = np.where(values > 0, values / sampling.repetition_penalty, values * sampling.repetition_penalty)
    if state.penalizes_output:
        ids, counts = state.output_counts()
        row[ids] -= sampling.frequency_penalty * counts + sampling.presence_penalty
    return row


def draw(row: Row, sampling: SamplingParams, number: float) -> int:
    """The token at which the cumulative probability of the kept tokens, likeliest first, passes `number` in [0, 1)."""
    weights = row - row.max()
    weights *= np.float32(1 / sampling.temperature)
    np.exp(weights, out=weights)
    top_k = sampling.top_k if 0 < sampling.top_k < len(row) else None
    total = float(weights.sum()) if top_k is None and sampling.min_p == 0 else None
    for cutoff in _CUTOFFS:
        values = np.sort(weights[weights >= cutoff])[::-1]
        place = _pick(values, cutoff, sampling, top_k, total, number)
        if place is not None:
            equals = np.flatnonzero(weights == values[place])
            return int(equals[place - np.searchsorted(-values, -values[place])])
    raise AssertionError("the last cutoff keeps every token")


def _pick(
    values: Row, cutoff: float, sampling: SamplingParams, top_k: int | None, total: float | None, number: float
) -> int | None:
    """Where in `values`, the head of all weights in order (down to `cutoff`), the drawn token is; None: not in it.

    `total`: the sum of all weights where neither top_k nor min_p cuts any off. The answer is the same for every cutoff
    that has one, because cumulative sums of a longer head begin with those of a shorter one.
    """
    cumulative = np.cumsum(values, dtype=np.float64)
    count, everything = len(values), cutoff == 0
    is_cut = everything
    if sampling.min_p >= cutoff and sampling.min_p > 0:
        count, is_cut = int(np.searchsorted(-values, -np.float32(sampling.min_p), side="right")), True
    if top_k is not None and count >= top_k:
        count, is_cut = top_k, True
    if total is None and not is_cut:
        return None
    mass = cumulative[count - 1] if total is None else total
    if sampling.top_p < 1:
        kept = int(np.searchsorted(cumulative[:count], sampling.top_p * mass)) + 1
        if kept > count and not is_cut:
            return None
        count, is_cut = min(kept, count), True
        mass = cumulative[count - 1]
    place = int(np.searchsorted(cumulative[:count], number * mass, side="right"))
    if place >= count and not is_cut:
        return None
    return min(place, count - 1)


def _logprobs(row: Row, token: int, num_top: int) -> Logprobs:
    peak = row.max()
    log_total = float(peak) + float(np.log(np.exp(row - peak).sum(dtype=np.float64)))
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        least = np.partition(row, len(row) - num_top)[len(row) - num_top]
        ids = np.flatnonzero(row >= least)
        ids = ids[np.argsort(-row[ids], kind="stable")][:num_top]
        top = tuple((int(i), float(row[i]) - log_total) for i in ids)
    return Logprobs(float(row[token]) - log_total, 1 + int((row > row[token]).sum()), top)


def _finish(state: RequestState, token: int, logprobs: Logprobs | None, max_model_len: int) -> Token:
    """Appends `token` to its request and says whether it is the last."""
    sampling, is_first = state.request.sampling, not state.request.output
    may_stop = not state.must_go_on
    state.append(token)
    finish = None
    if may_stop and token in state.stops:
        finish = FinishReason.STOP
    elif len(state.request.output) >= sampling.max_tokens or len(state.tokens) >= max_model_len:
        finish = FinishReason.LENGTH
    of_prompt = None
    if is_first and state.prompt_logprobs is not None:
        of_prompt, state.prompt_logprobs = tuple(state.prompt_logprobs), None
    return Token(token, finish, logprobs, of_prompt)
