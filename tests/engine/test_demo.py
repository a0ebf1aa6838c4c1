"""The real demo model: out of its GGUF file, through our engine, against transformers with the same weights."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from tests.engine.support import MiniScheduler, all_logits, greedy, load_model

from distserve.engine import hub
from distserve.engine.base import EngineOptions
from distserve.engine.executor import LocalExecutor
from distserve.engine.gguf_file import GGUFFile
from distserve.sched.base import Batch, Sequence

DEMO = hub.demo_path()
pytestmark = pytest.mark.skipif(not DEMO.exists(), reason="the demo model is not here; `make setup` fetches it")

# <|im_start|>system ... What is the capital of France? ... <|im_start|>assistant, by the checkpoint's own template
FRANCE = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182, 2]
FRANCE += [198, 1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]


@pytest.fixture(scope="module")
def reference() -> Any:
    """A plain transformers model, filled with the file's weights by another route than ours: gguf's own reader."""
    spec = hub.read_spec(DEMO)
    config = transformers.LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.ffn_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        max_position_embeddings=spec.max_model_len,
        rms_norm_eps=spec.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model.to_empty(device="cpu").eval()
    model.model.rotary_emb = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, spec.num_layers)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(DEMO).tensors}
    model.tie_weights()
    for name, parameter in model.named_parameters():
        stored_name = names.get_name(name, try_suffixes=(".weight",))
        assert stored_name is not None
        tensor = stored[stored_name]
        # as one long row, because the package goes through rows slowly
        shape = tuple(int(n) for n in tensor.shape[::-1])
        values = gguf.dequantize(tensor.data.reshape(1, -1), tensor.tensor_type).reshape(shape)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = len(values) // spec.head_dim
            values = values.reshape(heads, spec.head_dim // 2, 2, -1).swapaxes(1, 2).reshape(values.shape)
        parameter.data.copy_(torch.tensor(values))
    return model


def test_fp32_logits_equal_those_of_transformers(reference: Any) -> None:
    model = load_model(DEMO, torch.float32, 1024)
    long = torch.randint(3, 49152, (120,), generator=torch.Generator().manual_seed(5)).tolist()
    for prompt in (FRANCE, long, [504]):
        with torch.inference_mode():
            expected = reference(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(all_logits(model, prompt), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_fifty_varied_prompts_continue_as_with_transformers(reference: Any) -> None:
    """1 to 2,000 tokens, all at once in mixed batches, prompts in chunks. One pass of the reference over a prompt and
    our answer tells whether it would have chosen every token of it."""
    generator = torch.Generator().manual_seed(6)
    lengths = [2000, 500, *(int(200**u) for u in torch.rand(48, generator=generator).tolist())]
    prompts = [torch.randint(3, 49152, (n,), generator=generator).tolist() for n in lengths]
    model = load_model(DEMO, torch.float32, 4096)
    world = MiniScheduler(model, block_size=32, num_blocks=300, max_model_len=4096)
    answers = world.run([greedy(i, prompt, 8 + i % 9) for i, prompt in enumerate(prompts)], chunk=512)
    for i, prompt in enumerate(prompts):
        answer = [token.id for token in answers[i]]
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + answer[:-1]]), logits_to_keep=len(answer)).logits[0]
        assert logits.argmax(1).tolist() == answer, (i, len(prompt))


def test_bf16_knows_the_capital_of_france() -> None:
    model = load_model(DEMO, torch.bfloat16, 1024)
    answer = [token.id for token in MiniScheduler(model).run([greedy(1, FRANCE, 12)])[1]]
    assert _text(answer).startswith("The capital of France is Paris.")


def _text(ids: list[int]) -> str:
    vocabulary = GGUFFile(DEMO, arrays=True).metadata["tokenizer.ggml.tokens"]
    return "".join(vocabulary[i] for i in ids).replace("Ġ", " ")


async def test_the_executor_is_ready_quickly_and_small(tmp_path: Path) -> None:
    """From options to the first token in a few seconds of processor time, through a buffer that is given to it."""
    buffers: list[bytearray] = []

    def factory(size: int) -> bytearray:
        buffers.append(bytearray(size))
        return buffers[-1]

    executor = LocalExecutor(EngineOptions(str(DEMO), kv_bytes=1 << 26, max_model_len=1024), factory)
    steps: list[float] = []
    began = time.process_time()
    await executor.start(lambda fraction, what: steps.append(fraction))
    assert time.process_time() - began < 5
    assert steps == sorted(steps)
    assert steps[-1] == 1.0
    assert executor.kv_buffer is buffers[0]
    assert len(buffers[0]) == executor.num_blocks * executor.layout.block_bytes

    request = greedy(1, FRANCE, 3)
    executor.add(request)
    sequence = Sequence(1, len(FRANCE), blocks=[5, 3])
    result = await executor.execute(Batch(0, [(sequence, len(FRANCE))]))
    assert request.output == [result.tokens[1].id]
    assert any(buffers[0][5 * executor.layout.block_bytes : 6 * executor.layout.block_bytes])
    assert not any(buffers[0][7 * executor.layout.block_bytes :])
    executor.forget(1)
    executor.forget(1)
    await executor.stop()
