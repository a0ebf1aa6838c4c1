"""What the engine tests share: tiny checkpoints made on the spot, and the smallest scheduler that drives a runner."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from distserve.engine import hub, kernels, weights
from distserve.engine.kernels.bindings import Kernels, Unit
from distserve.engine.kernels.build import build as build_kernels
from distserve.engine.kv_cache import KVCache, private_buffer
from distserve.engine.models.base import Model, build
from distserve.engine.runner import Runner
from distserve.engine.state import RequestState
from distserve.engine.step import plan_step
from distserve.request import Request, SamplingParams, Token
from distserve.sched.base import Batch
from distserve.sched.base import Sequence as Scheduled
from distserve.specs import ModelSpec

CPU = torch.device("cpu")

TINY: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 1,
    "bos_token_id": 0,
    "initializer_range": 0.2,  # sharper than usual, so that greedy choices are clear
}


@contextmanager
def multiplying_in(unit: Unit | None) -> Iterator[Kernels]:
    """Kernels with this unit at most, from the library of this process: it is told what to use, and afterwards to use
    what it did. Skips the test where the processor does not have it."""
    usual = kernels.load()
    assert usual is not None
    loaded = ctypes.CDLL(str(build_kernels()))
    chosen = Kernels(loaded, unit)
    try:
        if chosen.unit != unit:
            pytest.skip(f"this processor does not multiply in {unit}")
        yield chosen
    finally:
        Kernels(loaded, usual.unit)


def make_checkpoint(folder: Path, family: str = "Llama", **changes: Any) -> Any:
    """A random checkpoint as `save_pretrained` writes it; returns the transformers model it came from."""
    shard = changes.pop("max_shard_size", "5GB")
    config = getattr(transformers, f"{family}Config")(**{**TINY, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    for name, parameter in model.named_parameters():  # norms and biases begin as constants: make them matter
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.2)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def load_model(path: Path, dtype: torch.dtype = torch.float32, max_model_len: int | None = None) -> Model:
    spec = hub.read_spec(path)
    with torch.inference_mode():
        model = build(spec, dtype)
        weights.load(path, model, CPU)
        model.finish(max_model_len or spec.max_model_len, CPU)
    return model


class MiniScheduler:
    """Drives a runner over a pool of blocks: prompts in chunks while others decode. The blocks it hands out
    are scattered on purpose."""

    def __init__(self, model: Model, *, block_size: int = 16, num_blocks: int = 64, max_model_len: int = 512) -> None:
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        layout = model.spec.kv_layout(block_size, dtype)
        self.kv = KVCache(layout, num_blocks, private_buffer(num_blocks * layout.block_bytes), CPU)
        self.runner = Runner(model, self.kv, max_model_len, CPU)
        self.spec: ModelSpec = model.spec
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).tolist()
        self.free: list[int] = order
        self.states: dict[int, RequestState] = {}
        self.sequences: dict[int, Scheduled] = {}
        self.tokens: dict[int, list[Token]] = {}
        self.failures: dict[int, str] = {}

    def add(self, request: Request) -> None:
        self.states[request.id] = RequestState(request, self.spec.vocab_size, self.spec.eos_token_ids)
        self.sequences[request.id] = Scheduled(request.id, request.num_tokens)
        self.tokens[request.id] = []

    def step(self, work: Iterable[tuple[int, int]]) -> None:
        """Computes the next `n` tokens of each (request id, n)."""
        items = []
        for request_id, count in work:
            sequence = self.sequences[request_id]
            while len(sequence.blocks) * self.kv.layout.block_size < sequence.num_computed + count:
                sequence.blocks.append(self.free.pop())
            items.append((sequence, count))
        result = self.runner.run(plan_step(Batch(0, items), self.states), self.states)
        for sequence, count in items:
            sequence.num_computed += count
            if token := result.tokens.get(sequence.id):
                sequence.num_tokens += 1
                self.tokens[sequence.id].append(token)
        self.failures |= result.failures
        for request_id in result.ended:
            self.free += self.sequences.pop(request_id).blocks

    def run(self, requests: Sequence[Request], chunk: int = 1 << 30) -> dict[int, list[Token]]:
        """All of them to their ends; prompts one after the other, `chunk` tokens a step, while others decode."""
        for request in requests:
            self.add(request)
        while self.sequences:
            work, budget = [], chunk
            for request_id, sequence in self.sequences.items():
                left = sequence.num_tokens - sequence.num_computed
                count = min(left, budget) if left > 1 else 1
                if count:
                    work.append((request_id, count))
                    budget -= count if left > 1 else 0
            self.step(work)
        return self.tokens


def greedy(request_id: int, prompt: Sequence[int], max_tokens: int, **sampling: Any) -> Request:
    params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, **sampling)
    return Request(request_id, list(prompt), params)


def reference_tokens(model: Any, prompt: Sequence[int], max_tokens: int) -> list[int]:
    """What transformers generates greedily."""
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, eos_token_id=None
        )
    return [int(token) for token in out[0, len(prompt) :]]


def all_logits(model: Model, prompt: Sequence[int]) -> Tensor:
    """[T, V] of a whole prompt, through the model as the runner calls it."""
    from distserve.engine.layers import StepLayout

    size = 16
    blocks = list(range(-(-len(prompt) // size)))
    layout = model.spec.kv_layout(size, str(next(model.parameters()).dtype).removeprefix("torch."))
    kv = KVCache(layout, len(blocks), private_buffer(len(blocks) * layout.block_bytes), CPU)
    step = StepLayout.build([len(prompt)], [len(prompt)], [blocks], size)
    with torch.inference_mode():
        return model.logits(model(torch.tensor(prompt, dtype=torch.int32), step, kv.layers, None))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
