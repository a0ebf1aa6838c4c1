"""Chat templates render as transformers renders them, and refuse with a 400 what they refuse."""

from __future__ import annotations

from typing import Any

import pytest

from distserve.errors import ModelError, RequestError
from distserve.serve.http.template import ChatTemplate

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": " two  \n"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": "ü"}}}]},
    {"role": "tool", "content": "3", "name": "f"},
    {"role": "assistant", "content": "Three", "reasoning_content": "counted"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"b": 1, "a": [1, 2]}}}]
TEMPLATES = {
    "blocks are trimmed": (
        "{%- for m in messages %}\n    {% if m.role == 'user' %}\n[{{ m.content | trim }}]\n    {% endif %}\n"
        "{% endfor %}"
    ),
    "loop controls": (
        "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{% if loop.index0 == 3 %}{% break %}"
        "{% endif %}{{ m.role }};{% endfor %}"
    ),
    "tojson": (
        "{{ tools | tojson }} {{ tools | tojson(indent=2) }} {{ messages[2].tool_calls | tojson(sort_keys=true) }}"
    ),
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}|{% endfor %}",
    "namespace and tokens": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
        "{{ bos_token }}{{ ns.n }}"
    ),
    "reasoning": "{{ messages[-1].reasoning_content }}{{ messages[-1].thinking }}{{ documents }}{{ extra }}",
    "undefined is empty": "{{ nothing }}{% if not nothing %}-{% endif %}{{ messages[0].name is defined }}",
    "prompt": "{% if add_generation_prompt %}<|assistant|>{% endif %}{{ dict(a=1) }}{{ messages[0]['content'][:2] }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_rendered_as_transformers_renders(name: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    ours = ChatTemplate(TEMPLATES[name], {"bos_token": "<s>"}).render(CHAT, tools=TOOLS, variables={"extra": "x"})
    rendered, _ = render_jinja_template(
        conversations=[CHAT],
        tools=TOOLS,
        chat_template=TEMPLATES[name],
        add_generation_prompt=True,
        bos_token="<s>",
        extra="x",
    )
    assert ours == rendered[0]


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}<{{ m.content }}>{% endfor %}",
        "{% for m in messages %}<{{ m.content | trim }}>{% endfor %}",
    ],
)
@pytest.mark.parametrize("content", ["One, two", "trailing  "])
def test_a_final_message_is_continued_as_transformers_does(source: str, content: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    chat = [{"role": "user", "content": "count"}, {"role": "assistant", "content": content}]
    ours = ChatTemplate(source, {}).render(chat, add_generation_prompt=False, continue_final_message=True)
    rendered, _ = render_jinja_template(conversations=[chat], chat_template=source, continue_final_message=True)
    assert ours == rendered[0]
    assert ours.endswith((content, content.rstrip()))


def test_strftime_now_is_there() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}", {}).render(CHAT).startswith("2")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "refuses this chat"),
        ("{{ messages.append(1) }}", "refuses this chat"),
        ("{{ ''.__class__.__mro__ }}", "refuses this chat"),
        ("{{ messages[0]['no']['way'] }}", "refuses this chat"),
        ("{% for i in range(10**9) %}{% endfor %}", "refuses this chat"),
    ],
)
def test_what_a_template_refuses_is_the_clients_error(source: str, said: str) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        ChatTemplate(source, {}).render(CHAT)
    assert (caught.value.status, caught.value.param) == (400, "messages")


def test_a_template_that_hides_the_final_message_cannot_continue_it() -> None:
    with pytest.raises(RequestError, match="cannot be continued"):
        ChatTemplate("constant", {}).render(CHAT, continue_final_message=True)
    with pytest.raises(RequestError, match="final message with text"):
        ChatTemplate("x", {}).render([{"role": "user", "content": None}], continue_final_message=True)


def test_a_template_that_does_not_compile_is_the_checkpoints_error() -> None:
    with pytest.raises(ModelError, match="does not compile"):
        ChatTemplate("{% for %}", {})
