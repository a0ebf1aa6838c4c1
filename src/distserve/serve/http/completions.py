"""From a validated body to an `Answer` that can be run: prompts, sampling, one request per choice."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from distserve.errors import RequestError
from distserve.request import Request, SamplingParams
from distserve.serve.base import Generator
from distserve.serve.http import sampling
from distserve.serve.http.choices import Answer, Choice
from distserve.serve.http.logprobs import ChatLogprobs, CompletionLogprobs, LogprobsFormat
from distserve.serve.http.openai import ChatCompletionRequest, CompletionRequest, Generation
from distserve.serve.http.prompts import MAX_PROMPTS, Prompt, chat_prompt, text_prompts
from distserve.serve.http.text import StopStrings, TextStream
from distserve.serve.http.tokens import Tokenizer


@dataclass(frozen=True, slots=True)
class Completions:
    """Makes answers for one served model."""

    generator: Generator
    tokens: Tokenizer
    models: tuple[str, ...]  # its names; the first is used where the client leaves the model out
    defaults: Mapping[str, float] = field(
        default_factory=dict
    )  # sampling, from the checkpoint's generation_config.json

    @property
    def limit(self) -> int:
        """Tokens a prompt and its answer may have together."""
        return min(self.generator.max_model_len, self.generator.max_kv_tokens or self.generator.max_model_len)

    def model(self, asked: str | None) -> str:
        if not asked:
            return self.models[0]
        if asked not in self.models:
            raise RequestError(
                f"The model `{asked}` does not exist. Served here: {', '.join(self.models)}.",
                param="model",
                status=404,
                code="model_not_found",
            )
        return asked

    async def chat(self, body: ChatCompletionRequest, request_id: str) -> Answer:
        arrival = time.monotonic()
        model = self.model(body.model)
        sampling.refuse_unsupported(body)
        logprobs = sampling.chat_logprobs(body)
        stops = sampling.stop_strings(body)
        prompt = await chat_prompt(body, self.tokens, bool(body.add_special_tokens), self.limit)
        asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        length = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        params = sampling.sampling_params(
            body,
            max_tokens=sampling.max_tokens(asked, None, len(prompt.ids), self.limit, (length, "messages")),
            logprobs=logprobs,
            prompt_logprobs=None,
            vocab_size=self.tokens.vocab_size,
            defaults=self.defaults,
        )
        answer = self._answer(body, f"chatcmpl-{request_id}", model, len(prompt.ids))
        for one in params:
            choice = self._choice(body, answer, prompt, one, stops, arrival)
            choice.logprobs = None if logprobs is None else ChatLogprobs(self.tokens.spelled)
        return answer

    async def complete(self, body: CompletionRequest, request_id: str) -> Answer:
        arrival = time.monotonic()
        model = self.model(body.model)
        sampling.refuse_unsupported(body)
        logprobs = sampling.completion_logprobs(body)
        stops = sampling.stop_strings(body)
        silent = body.max_tokens == 0  # only the prompt, for its log-probabilities: still one step of the model
        if silent and not body.echo:
            raise RequestError("max_tokens must be at least 1 (0 is for echo only)", param="max_tokens")
        special = body.add_special_tokens is not False
        prompts = await text_prompts(body.prompt, self.tokens, special, self.limit)
        if (total := len(prompts) * (body.n or 1)) > MAX_PROMPTS:
            raise RequestError(f"{total} choices are too many: n times prompts may be at most {MAX_PROMPTS}", param="n")
        answer = self._answer(body, f"cmpl-{request_id}", model, sum(len(prompt.ids) for prompt in prompts))
        for prompt in prompts:
            asked = 1 if silent else body.max_tokens
            default = sampling.COMPLETION_TOKENS
            params = sampling.sampling_params(
                body,
                max_tokens=sampling.max_tokens(asked, default, len(prompt.ids), self.limit, ("max_tokens", "prompt")),
                logprobs=logprobs,
                prompt_logprobs=logprobs if body.echo else None,
                vocab_size=self.tokens.vocab_size,
                defaults=self.defaults,
            )
            for one in params:
                choice = self._choice(body, answer, prompt, one, stops, arrival)
                choice.silent = silent
                choice.echo = self._text(prompt) if body.echo else None
                choice.logprobs = None if logprobs is None else self._completion_logprobs(body)
        return answer

    def _answer(self, body: Generation, id: str, model: str, num_prompt_tokens: int) -> Answer:
        options = body.stream_options
        return Answer(
            id=id,
            model=model,
            created=int(time.time()),
            chat=isinstance(body, ChatCompletionRequest),
            num_prompt_tokens=num_prompt_tokens,
            stream=bool(body.stream),
            include_usage=bool(options and options.include_usage),
            continuous_usage=bool(options and options.include_usage and options.continuous_usage_stats),
        )

    def _choice(
        self,
        body: Generation,
        answer: Answer,
        prompt: Prompt,
        params: SamplingParams,
        stops: StopStrings | None,
        arrival: float,
    ) -> Choice:
        """One more choice of `answer`."""
        pieces = self.tokens.spelled if body.skip_special_tokens is False else self.tokens.pieces
        include_stop = bool(body.include_stop_str_in_output)
        text = TextStream(pieces, stops, include_stop=include_stop, min_tokens=params.min_tokens)
        request = Request(id=self.generator.next_id(), prompt=prompt.ids, sampling=params, arrival=arrival)
        choice = Choice(index=len(answer.choices), request=request, text=text)
        answer.choices.append(choice)
        return choice

    def _text(self, prompt: Prompt) -> str:
        return prompt.text if prompt.text is not None else self.tokens.decode(prompt.ids)

    def _completion_logprobs(self, body: Generation) -> LogprobsFormat:
        pieces = self.tokens.spelled if body.skip_special_tokens is False else self.tokens.pieces
        return CompletionLogprobs(self.tokens.spelled, pieces)
