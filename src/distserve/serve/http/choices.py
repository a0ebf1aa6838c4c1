"""The choices of an answer while they grow: each is one request to the gateway and the text that comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from distserve.request import FinishReason, Request, Token
from distserve.serve.http.logprobs import LogprobsFormat
from distserve.serve.http.text import TextStream


@dataclass(slots=True)
class Choice:
    index: int
    request: Request
    text: TextStream
    logprobs: LogprobsFormat | None = None
    echo: str | None = None  # the prompt's text, to come first (completions); None once it has come
    silent: bool = False  # only the prompt was wanted (max_tokens 0): the one generated token is dropped

    def feed(self, tokens: Sequence[Token]) -> str:
        """The text that became certain; log-probabilities of the same tokens are collected in `logprobs`."""
        if self.logprobs is None and self.echo is None and not self.silent:
            return self.text.feed(tokens)
        known = self.text.num_tokens
        text = self.text.feed(tokens)
        used = tokens[: self.text.num_tokens - known]
        if self.echo is not None:
            text = self.echo if self.silent else self.echo + text
            self.echo = None
            if self.logprobs is not None and used[0].prompt_logprobs is not None:
                self.logprobs.add(zip(self.request.prompt, used[0].prompt_logprobs, strict=True))
        if self.logprobs is not None and not self.silent:
            self.logprobs.add((token.id, token.logprobs) for token in used)
        return text

    @property
    def num_tokens(self) -> int:
        return 0 if self.silent else self.text.num_tokens

    @property
    def finish(self) -> FinishReason | None:
        finish = self.text.finish
        return FinishReason.LENGTH if self.silent and finish is not None else finish

    @property
    def stop(self) -> str | int | None:
        """What stopped it, where that was the client's own stop string or stop token."""
        stop = self.text.stop
        return stop if isinstance(stop, str) or stop in self.request.sampling.stop_token_ids else None


@dataclass(slots=True)
class Answer:
    """Everything that is needed to write an answer, streamed or whole."""

    id: str
    model: str
    created: int  # seconds since 1970
    chat: bool  # in the chat's format; else the completion's
    num_prompt_tokens: int
    choices: list[Choice] = field(default_factory=list)
    stream: bool = False
    include_usage: bool = False  # a last chunk with usage and no choices
    continuous_usage: bool = False  # usage in every chunk

    def usage(self) -> dict[str, int]:
        answered = sum(choice.num_tokens for choice in self.choices)
        prompt = self.num_prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": answered, "total_tokens": prompt + answered}
