"""The Qwen2 family (Qwen2, Qwen2.5): llama with biases on queries, keys and values, which the spec says."""

from __future__ import annotations

from distserve.engine.models.llama import Llama


class Qwen2(Llama):
    """Knows its name; the rest is llama's."""


build = Qwen2
