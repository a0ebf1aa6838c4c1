"""From a request's fields to `SamplingParams` and stop strings: our defaults and limits; refusals name the field."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from distserve.errors import RequestError
from distserve.request import MAX_LOGPROBS, SamplingParams
from distserve.serve.http.openai import ChatCompletionRequest, CompletionRequest, Generation
from distserve.serve.http.prompts import too_long
from distserve.serve.http.text import StopStrings

MAX_STOPS = 64
MAX_STOP_CHARACTERS = 1024  # of one stop string
MAX_STOP_TOKENS = 1024
MAX_BIASES = 1024
COMPLETION_TOKENS = 16  # OpenAI's default for plain completions
_SEEDS = 1 << 64
# where the request says nothing and the checkpoint's generation_config.json neither
_DEFAULTS: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
# vLLM's fields that promise a form of the answer: to ignore them would break that promise silently
_CONSTRAINTS = (
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "structured_outputs",
    "use_beam_search",
)


def chat_logprobs(body: ChatCompletionRequest) -> int | None:
    """How many likeliest tokens to report at each position; None: no log-probabilities at all."""
    if not body.logprobs:
        if body.top_logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
        return None
    return _in_range(body.top_logprobs or 0, "top_logprobs")


def completion_logprobs(body: CompletionRequest) -> int | None:
    return None if body.logprobs is None else _in_range(body.logprobs, "logprobs")


def _in_range(count: int, param: str) -> int:
    if not 0 <= count <= MAX_LOGPROBS:
        raise RequestError(f"{param} must be between 0 and {MAX_LOGPROBS}, not {count}", param=param)
    return count


def max_tokens(asked: int | None, default: int | None, num_prompt: int, limit: int, params: tuple[str, str]) -> int:
    """How long an answer may become. `limit`: tokens of prompt and answer together; `params`: the names of the fields
    for the length and for the prompt. Without `asked` and `default` all that is left of the context."""
    length, prompt = params
    room = limit - num_prompt
    if room < 1:
        raise too_long(num_prompt, limit, prompt)
    if asked is None:
        return room if default is None else min(default, room)
    if asked > room:
        raise RequestError(
            f"This model's maximum context length is {limit} tokens. However, you requested {num_prompt + asked} "
            f"tokens ({num_prompt} in the {prompt}, {asked} in {length}). Please reduce the {prompt} or {length}.",
            param=length,
            code="context_length_exceeded",
        )
    return asked


def stop_strings(body: Generation) -> StopStrings | None:
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stops) > MAX_STOPS:
        raise RequestError(f"stop holds {len(stops)} strings; at most {MAX_STOPS} are allowed", param="stop")
    for stop in stops:
        if not stop:
            raise RequestError("stop must not hold an empty string", param="stop")
        if len(stop) > MAX_STOP_CHARACTERS:
            raise RequestError(
                f"stop holds a string of {len(stop)} characters; at most {MAX_STOP_CHARACTERS} are allowed",
                param="stop",
            )
    return StopStrings(stops) if stops else None


def refuse_unsupported(body: Generation) -> None:
    """What would change the answer and cannot be done here is refused, not ignored."""
    format = (body.response_format or {}).get("type", "text")
    if format != "text":
        raise RequestError(
            f"response_format of type {format!r:.60} is not supported: only 'text' is", param="response_format"
        )
    for name in _CONSTRAINTS:
        if (body.model_extra or {}).get(name):
            raise RequestError(f"{name} is not supported", param=name)
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise RequestError("best_of is not supported: leave it out or set it to n", param="best_of")
    if isinstance(body, CompletionRequest) and body.suffix:
        raise RequestError("suffix is not supported: text can only be continued at its end", param="suffix")
    if isinstance(body, ChatCompletionRequest) and body.tool_choice not in (None, "none", "auto"):
        raise RequestError("tool_choice can be 'none' or 'auto': a call cannot be forced", param="tool_choice")
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream to be true", param="stream_options")


def sampling_params(
    body: Generation,
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
    vocab_size: int,
    defaults: Mapping[str, float],
) -> list[SamplingParams]:
    """One for each of the `n` choices; they differ in the seed. Raises `RequestError` naming the field."""
    given = {name: value for name in _DEFAULTS if (value := getattr(body, name)) is not None}
    if body.top_k is not None:
        given["top_k"] = min(body.top_k, vocab_size)  # more than there are: all of them
    seed = random.getrandbits(64) if body.seed is None else body.seed
    first = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=body.min_tokens or 0,
        **{**_DEFAULTS, **defaults, **given},
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        seed=seed % _SEEDS,
        stop_token_ids=_stop_tokens(body.stop_token_ids or [], vocab_size),
        ignore_eos=bool(body.ignore_eos),
        logit_bias=_logit_bias(body.logit_bias or {}, vocab_size),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )
    return [first, *(replace(first, seed=(seed + i) % _SEEDS) for i in range(1, body.n or 1))]


def _stop_tokens(ids: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    if len(ids) > MAX_STOP_TOKENS:
        raise RequestError(
            f"stop_token_ids holds {len(ids)} ids; at most {MAX_STOP_TOKENS} are allowed", param="stop_token_ids"
        )
    for i, id in enumerate(ids):
        if not 0 <= id < vocab_size:
            raise RequestError(
                f"stop_token_ids[{i}] is {id}, which is no token of this model (0 to {vocab_size - 1})",
                param=f"stop_token_ids[{i}]",
            )
    return tuple(ids)


def _logit_bias(biases: Mapping[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    if len(biases) > MAX_BIASES:
        raise RequestError(
            f"logit_bias holds {len(biases)} tokens; at most {MAX_BIASES} are allowed", param="logit_bias"
        )
    result = []
    for key, bias in biases.items():
        if not (key.isascii() and key.isdecimal() and int(key) < vocab_size):
            raise RequestError(
                f"logit_bias names {key!r:.60}, which is no token id of this model (0 to {vocab_size - 1})",
                param="logit_bias",
            )
        if not -100 <= bias <= 100:
            raise RequestError(f"logit_bias must be between -100 and 100, not {bias} (token {key})", param="logit_bias")
        result.append((int(key), bias))
    return tuple(result)
