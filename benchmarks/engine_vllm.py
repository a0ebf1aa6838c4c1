"""The vLLM contender of `benchmarks.engine`: its engine in this process, stepped by hand, under its own interpreter.

As fast as it goes on one core: compiled (inductor), no process border inside (VLLM_ENABLE_V1_MULTIPROCESSING=0), prefix
caching off, a whole prompt in one step, no detokenization.
"""

from __future__ import annotations

import argparse
import os
import time

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # the worker was pinned before it started
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ["VLLM_HOST_IP"] = "127.0.0.1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"

import torch
from vllm import EngineArgs, LLMEngine, SamplingParams

from benchmarks.harness import serve_commands


class VLLM:
    def __init__(self, model: str) -> None:
        torch.set_num_threads(1)
        self.engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=model,
                dtype="bfloat16",
                max_model_len=4096,
                max_num_seqs=64,
                max_num_batched_tokens=4096,
                enable_prefix_caching=False,
            )
        )
        self.count = 0
        self.open_ids: list[str] = []

    def _add(self, prompt: list[int], tokens: int) -> str:
        self.count += 1
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        self.engine.add_request(str(self.count), {"prompt_token_ids": prompt}, params)
        return str(self.count)

    def prefill(self, prompt: list[int]) -> float:
        """Seconds from the prompt's token ids to its first new token."""
        self._close()
        begin = time.perf_counter()
        self._add(prompt, 1)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return time.perf_counter() - begin

    def open(self, prompts: list[list[int]]) -> None:
        """Makes a batch ready to decode: steps until every sequence has its first token."""
        self._close()
        self.open_ids = [self._add(prompt, 1000) for prompt in prompts]
        waiting = set(self.open_ids)
        while waiting:
            for output in self.engine.step():
                waiting.discard(output.request_id)

    def steps(self, count: int) -> float:
        """Seconds for `count` decode steps of the open batch."""
        begin = time.perf_counter()
        for _ in range(count):
            outputs = self.engine.step()
            assert len(outputs) == len(self.open_ids), "a step that is not the whole batch's"
        return time.perf_counter() - begin

    def _close(self) -> None:
        if self.open_ids:
            self.engine.abort_request(self.open_ids)
            self.open_ids = []


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    contender = VLLM(parser.parse_args().model)
    serve_commands({"prefill": contender.prefill, "open": contender.open, "steps": contender.steps})
