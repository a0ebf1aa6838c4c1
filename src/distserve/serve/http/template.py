"""A checkpoint's chat template: messages to the text of a prompt. Knows no tokens and no HTTP.

Templates are Jinja written for Hugging Face transformers and rely on what its `apply_chat_template` offers: an
immutable sandbox, trimmed blocks, loop controls, `raise_exception`, `strftime_now`, a `tojson` that does not escape
HTML, `{% generation %}` blocks, `reasoning_content`. Importing transformers for this costs a second and 40 MB, so the
same environment is built here; a test renders the same chats with both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from distserve.errors import ModelError, RequestError

_CONTINUE = "CONTINUE_FINAL_MESSAGE_TAG "  # marks where the final message ends, to cut the rendered text there
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names a message's reasoning goes by

Message = dict[str, Any]


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012  declared so by Jinja

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Callable[[], str]) -> str:
        return caller()


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """One template, compiled once. `variables` are the special tokens by name (`bos_token`, `eos_token`, ...)."""

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        self.source = source
        self._variables = dict(variables)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ModelError(f"the checkpoint's chat template does not compile: {error}") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text, special tokens spelled out; the template sees `variables`, too.

        Raises `RequestError` where the template refuses the chat.
        """
        messages = [_with_reasoning(message) for message in messages]
        if continue_final_message:
            messages[-1] = {**messages[-1], "content": _final_content(messages) + _CONTINUE}
        known = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        try:
            text = self._template.render({"documents": None, **self._variables, **(variables or {}), **known})
        except Exception as error:  # a template is foreign code that met data it did not expect: any kind can come out
            raise RequestError(f"the model's chat template refuses this chat: {error}", param="messages") from error
        return _cut(text) if continue_final_message else text


def _with_reasoning(message: Message) -> Message:
    reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _final_content(messages: Sequence[Message]) -> str:
    content = messages[-1].get("content")
    if not isinstance(content, str):
        raise RequestError("continue_final_message needs a final message with text", param="messages")
    return content


def _cut(text: str) -> str:
    """Ends the rendered text where the final message's content ends (templates may have trimmed it)."""
    at = text.rfind(_CONTINUE.strip())
    if at < 0:
        raise RequestError(
            "the model's chat template does not show the final message, so it cannot be continued",
            param="continue_final_message",
        )
    return text[:at] if text.startswith(_CONTINUE, at) else text[:at].rstrip()
