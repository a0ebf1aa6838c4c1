"""The Hugging Face transformers contender of `benchmarks.engine`: the model as its users call it, greedy, DynamicCache.

Attention is PyTorch's SDPA (its default); only the last position's logits are computed, as its `generate` does.
"""

from __future__ import annotations

import argparse
import time

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.harness import serve_commands


class Transformers:
    def __init__(self, model: str) -> None:
        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
        self.cache = DynamicCache()
        self.last = torch.zeros(0, dtype=torch.int64)

    def _forward(self, ids: torch.Tensor) -> None:
        logits = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        self.last = logits[:, -1].argmax(-1, keepdim=True)

    @torch.inference_mode()
    def prefill(self, prompt: list[int]) -> float:
        """Seconds from the prompt's token ids to its first new token."""
        self.cache = DynamicCache()
        begin = time.perf_counter()
        self._forward(torch.tensor([prompt]))
        return time.perf_counter() - begin

    @torch.inference_mode()
    def open(self, prompts: list[list[int]]) -> None:
        """Makes a batch ready to decode."""
        self.cache = DynamicCache()
        self._forward(torch.tensor(prompts[:1]))
        self.cache.batch_repeat_interleave(len(prompts))  # what the cached tokens are does not matter to the time
        self.last = torch.tensor([[prompt[-1]] for prompt in prompts])

    @torch.inference_mode()
    def steps(self, count: int) -> float:
        """Seconds for `count` decode steps of the open batch."""
        begin = time.perf_counter()
        for _ in range(count):
            self._forward(self.last)
        return time.perf_counter() - begin


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    contender = Transformers(parser.parse_args().model)
    serve_commands({"prefill": contender.prefill, "open": contender.open, "steps": contender.steps})
