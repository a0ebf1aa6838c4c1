"""The bodies of the HTTP interface as pydantic models: names and types of fields; no meaning, no defaults.

Types are strict ("16" is no number). Fields nobody here knows are accepted and ignored; null means left out. The names
are OpenAI's, plus those that vLLM added and load generators send.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

InvalidBodyError = ValidationError  # `errors()` lists what is wrong

MAX_CHOICES = 128  # OpenAI's limit on n

_PROMPT: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
    ]
}


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str | None = None


AnyBody = TypeVar("AnyBody", bound=Body)


def validate(model: type[AnyBody], content: Any) -> AnyBody:
    """`content` as decoded from JSON. Raises `InvalidBodyError`."""
    return model.model_validate(content, from_attributes=True)  # as FastAPI does: the words of errors depend on it


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Generation(Body):
    """What chat and plain completions share."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    response_format: dict[str, Any] | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = None
    user: str | None = None


class ChatMessage(BaseModel):
    """One message; `content` is text, a list of text parts, or null (an assistant's that only calls tools)."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[str | dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class ChatPrompt(Body):
    """What is needed to render a chat: shared by completions and /tokenize."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class ChatCompletionRequest(ChatPrompt, Generation):
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tool_choice: str | dict[str, Any] | None = None


class CompletionRequest(Generation):
    # any type here: `prompts.py` checks it, quickly also for a list of 100,000 integers, and names what is wrong
    prompt: Annotated[Any, WithJsonSchema(_PROMPT)] = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None


class TokenizeRequest(Body):
    """Either `prompt` or the fields of a chat."""

    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    tokens: list[int]
