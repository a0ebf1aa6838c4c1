"""What an instance did, counted. Knows no instance."""

from __future__ import annotations


class Usage:
    """What an instance did, and its largest steps."""

    __slots__ = ("batch", "busy", "context", "prompt_tokens", "steps")

    def __init__(self) -> None:
        self.busy = 0.0  # seconds of its first stage
        self.steps = 0
        self.prompt_tokens = 0
        self.batch = 0  # sequences that decode
        self.context = 0  # summed over them

    def saw(self, prompt_tokens: int, batch: int, context: int) -> None:
        if prompt_tokens > self.prompt_tokens:
            self.prompt_tokens = prompt_tokens
        if batch > self.batch:
            self.batch = batch
        if context > self.context:
            self.context = context
