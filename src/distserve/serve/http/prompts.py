"""From a request's messages or prompt to token ids. Knows fields and their names, no sampling and no answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distserve.errors import RequestError
from distserve.serve.http.openai import ChatMessage, ChatPrompt, TokenizeRequest
from distserve.serve.http.tokens import Tokenizer

MAX_PROMPTS = 2048  # of one completion request


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as the model sees it, and as text where the client sent text."""

    ids: list[int]
    text: str | None


async def chat_prompt(
    body: ChatPrompt | TokenizeRequest, tokens: Tokenizer, add_special_tokens: bool, limit: int
) -> Prompt:
    """Renders the chat with the checkpoint's template and tokenizes it once. `limit`: tokens the context has."""
    if body.chat_template is not None:
        raise RequestError(
            "a chat_template cannot be brought along: the checkpoint's own is used", param="chat_template"
        )
    continued = bool(body.continue_final_message)
    add_generation_prompt = not continued if body.add_generation_prompt is None else body.add_generation_prompt
    if continued and add_generation_prompt:
        raise RequestError(
            "continue_final_message and add_generation_prompt exclude each other: set one of them to false",
            param="continue_final_message",
        )
    variables = body.chat_template_kwargs or {}
    for name in ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message"):
        if name in variables:
            raise RequestError(f"send {name} as a field of its own", param=f"chat_template_kwargs.{name}")
    text = tokens.render(
        [_message(message, i) for i, message in enumerate(body.messages or ())],
        tools=body.tools or None,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continued,
        variables={**variables, "documents": body.documents},
    )
    return Prompt(await _encode(text, tokens, add_special_tokens, limit, "messages"), text)


async def text_prompts(prompt: Any, tokens: Tokenizer, add_special_tokens: bool, limit: int) -> list[Prompt]:
    """The prompts of a completion: a string, strings, token ids, or lists of token ids."""
    if prompt is None:
        raise RequestError("prompt is missing", param="prompt")
    if isinstance(prompt, str):
        return [await _text_prompt(prompt, tokens, add_special_tokens, limit, "prompt")]
    if not isinstance(prompt, list) or not prompt:
        raise RequestError(
            "prompt must be a string, a list of strings, a list of token ids or a list of such lists, and not empty",
            param="prompt",
        )
    if isinstance(prompt[0], int):
        return [_id_prompt(prompt, tokens, "prompt")]
    if len(prompt) > MAX_PROMPTS:
        raise RequestError(f"prompt holds {len(prompt)} prompts; at most {MAX_PROMPTS} are allowed", param="prompt")
    prompts = []
    for i, one in enumerate(prompt):
        param = f"prompt[{i}]"
        if isinstance(one, str):
            prompts.append(await _text_prompt(one, tokens, add_special_tokens, limit, param))
        elif isinstance(one, list):
            prompts.append(_id_prompt(one, tokens, param))
        else:
            raise RequestError(f"{param} must be a string or a list of token ids, not {one!r:.60}", param=param)
    return prompts


async def _text_prompt(text: str, tokens: Tokenizer, add_special_tokens: bool, limit: int, param: str) -> Prompt:
    return Prompt(await _encode(text, tokens, add_special_tokens, limit, param), text)


def _id_prompt(ids: list[Any], tokens: Tokenizer, param: str) -> Prompt:
    if not ids:
        raise RequestError(f"{param} is empty: it must hold at least one token", param=param)
    if set(map(type, ids)) != {int}:
        i, id = next((i, id) for i, id in enumerate(ids) if type(id) is not int)
        raise RequestError(f"{param}[{i}] must be a token id, not {id!r:.60}", param=f"{param}[{i}]")
    if min(ids) < 0 or max(ids) >= tokens.vocab_size:
        i, id = next((i, id) for i, id in enumerate(ids) if not 0 <= id < tokens.vocab_size)
        raise RequestError(
            f"{param}[{i}] is {id}, which is no token of this model (0 to {tokens.vocab_size - 1})",
            param=f"{param}[{i}]",
        )
    return Prompt(ids, None)


async def _encode(text: str, tokens: Tokenizer, add_special_tokens: bool, limit: int, param: str) -> list[int]:
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{param} holds half of a surrogate pair (\\ud800 to \\udfff), which is no text", param=param
        ) from error
    if size > limit * tokens.longest_piece:  # far too long: not worth tokenizing
        at_least = -(-size // tokens.longest_piece)
        raise too_long(f"at least {at_least}", limit, param)
    ids = await tokens.encode_async(text, add_special_tokens)
    if not ids:
        raise RequestError(f"{param} is empty: it must hold at least one token", param=param)
    return ids


def too_long(num_tokens: int | str, limit: int, param: str) -> RequestError:
    return RequestError(
        f"This model's maximum context length is {limit} tokens. However, your {param} resulted in {num_tokens} "
        f"tokens, and at least one more is needed for the answer. Please reduce the length of the {param}.",
        param=param,
        code="context_length_exceeded",
    )


def _message(message: ChatMessage, index: int) -> dict[str, Any]:
    """A message as chat templates expect it: plain JSON, content as one string."""
    path = f"messages[{index}]"
    plain = {name: value for name, value in message.model_dump().items() if value is not None}
    plain["role"] = "system" if message.role == "developer" else message.role  # templates know no "developer"
    plain["content"] = _content(message.content, message.role, f"{path}.content")
    if message.tool_calls:
        plain["tool_calls"] = [_tool_call(call, f"{path}.tool_calls[{i}]") for i, call in enumerate(message.tool_calls)]
    return plain


def _content(content: str | Sequence[str | dict[str, Any]] | None, role: str, path: str) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        if role != "assistant":
            raise RequestError(f"{path} is missing: a {role} message needs text", param=path)
        return ""
    texts = []
    for i, part in enumerate(content):
        texts.append(part if isinstance(part, str) else _part(part, f"{path}[{i}]"))
    return "\n".join(texts)


def _part(part: dict[str, Any], path: str) -> str:
    kind = part.get("type")
    if kind not in ("text", "input_text", "output_text", "refusal"):
        raise RequestError(
            f"{path} is of type {kind!r:.60}, which is not supported: this model reads text only", param=f"{path}.type"
        )
    field = "refusal" if kind == "refusal" else "text"
    text = part.get(field)
    if not isinstance(text, str):
        raise RequestError(f"{path}.{field} must be a string", param=f"{path}.{field}")
    return text


def _tool_call(call: dict[str, Any], path: str) -> dict[str, Any]:
    """OpenAI sends a call's arguments as JSON text; templates expect the object."""
    function = call.get("function")
    if not isinstance(function, dict):
        raise RequestError(f"{path}.function must be an object", param=f"{path}.function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            raise RequestError(
                f"{path}.function.arguments is not valid JSON: {error}", param=f"{path}.function.arguments"
            ) from error
    return {**call, "function": {**function, "arguments": arguments}}
