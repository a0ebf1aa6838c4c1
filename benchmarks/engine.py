"""How fast the engine computes on one core: ours, Hugging Face transformers and vLLM, in turns, in one run.

    python -m benchmarks.engine [--vllm-python PATH] [--core 1] [--rounds 5] [--quick | --points p128,b8x1024]
                                [--json FILE|-]

`--vllm-python` names the interpreter of a virtual environment that holds vLLM's CPU build (docs/measurements.md tells
how to make one); without it that column says "not installed".

How each number is taken. Every contender is a process pinned to `--core`, ready and idle before the first round, with
bf16 weights of the demo model (peers get them as a Hugging Face folder that `benchmarks.export_demo` writes) and random
prompts, the same for all.

- decode, batch b, context c: b prompts of c tokens are prefilled; then in each round every contender in turn makes 8
  greedy steps of the whole batch; a round's figure is the mean of its 8. One untimed round goes before.
- prefill, n tokens: in each round every contender in turn computes a prompt it has not seen, from ids to the first
  token. One untimed round goes before.
- figures are medians over the rounds; ratios are medians of each round's own ratio. The JSON has every round.
- of the limit: memory bandwidth and bf16 matrix rate of the core (`benchmarks/engine_limits.py`) are measured in every
  round too. A decode step must read every weight and the batch's KV once; a prompt needs 2 operations per weight and
  token (the embedding's and, but for the last token, the head's excepted), and causal attention's. The share is that
  least time over ours.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from benchmarks.export_demo import export
from benchmarks.harness import OUT, Absent, Worker, describe, machine, report, say, table
from distserve.engine.hub import read_spec, resolve
from distserve.specs import ModelSpec

DECODE = {f"b{batch}x{context}": (batch, context) for context in (256, 1024) for batch in (1, 8, 32)}
PREFILL = {f"p{tokens}": tokens for tokens in (128, 512, 2048)}
QUICK = ["b1x256", "b8x256", "b32x256", "p128", "p512"]
STEPS = 8  # decode steps of one round
US, HF, VLLM = "distserve", "transformers", "vLLM"
LIMIT = "limit"  # stands among the contenders: what the core could do at best
Times = dict[str, list[float]]  # by contender: seconds of a step or a prompt, one per round


def contenders(stack: ExitStack, core: int, vllm_python: str | None) -> tuple[dict[str, Worker], dict[str, str]]:
    """Those that can run, started and ready, and for the others why not."""
    file, folder = resolve("demo"), demo_folder()
    starts: dict[str, Callable[[], Worker]] = {
        US: lambda: Worker("benchmarks.engine_distserve", str(file), "--core", str(core), core=core),
        HF: lambda: Worker("benchmarks.engine_transformers", str(folder), core=core),
        VLLM: lambda: vllm(folder, core, vllm_python),
    }
    ready: dict[str, Worker] = {}
    absent: dict[str, str] = {}
    for name, start in starts.items():
        say(f"starting {name}")
        try:
            ready[name] = stack.enter_context(start())
        except Absent as error:
            absent[name] = str(error)
            say(f"{name}: {error}")
    return ready, absent


def demo_folder() -> Path:
    """The demo model as a Hugging Face folder in bf16, for peers; written at the first call."""
    folder = OUT / "demo-hf"
    if not (folder / "generation_config.json").exists():
        export(resolve("demo"), folder, "bfloat16")
    return folder


def vllm(folder: Path, core: int, python: str | None) -> Worker:
    if python is None:
        raise Absent("not installed")
    return Worker("benchmarks.engine_vllm", str(folder), core=core, python=python)


class Course:
    """One run: the points, and who is measured on them."""

    def __init__(self, workers: dict[str, Worker], limits: Worker, rounds: int, spec: ModelSpec) -> None:
        self.workers = workers
        self.limits = limits
        self.rounds = rounds
        self.random = random.Random(0)
        self.spec = spec
        self.bandwidths: list[float] = []
        self.gemms: list[float] = []

    def prompt(self, tokens: int) -> list[int]:
        return [self.random.randrange(self.spec.vocab_size) for _ in range(tokens)]

    def _memory_floor(self, nbytes: float) -> float:
        """Seconds in which the core, as it is now, can read so many bytes."""
        self.bandwidths.append(self.limits.seconds("bandwidth"))
        return nbytes / self.bandwidths[-1]

    def _compute_floor(self, operations: float) -> float:
        self.gemms.append(self.limits.seconds("gemm"))
        return operations / self.gemms[-1]

    def decode(self, batch: int, context: int) -> Times:
        prompts = [self.prompt(context) for _ in range(batch)]
        for worker in self.workers.values():
            worker.ask("open", prompts=prompts)
        times: Times = {name: [] for name in (*self.workers, LIMIT)}
        for turn in range(self.rounds + 1):
            for name, worker in self.workers.items():
                seconds = worker.seconds("steps", count=STEPS) / STEPS
                if turn:
                    times[name].append(seconds)
            if turn:
                reached = context + turn * STEPS + STEPS // 2
                times[LIMIT].append(self._memory_floor(decode_bytes(self.spec, batch, reached)))
        return times

    def prefill(self, tokens: int) -> Times:
        times: Times = {name: [] for name in (*self.workers, LIMIT)}
        for turn in range(self.rounds + 1):
            prompt = self.prompt(tokens)
            for name, worker in self.workers.items():
                seconds = worker.seconds("prefill", prompt=prompt)
                if turn:
                    times[name].append(seconds)
            if turn:
                times[LIMIT].append(self._compute_floor(prefill_operations(self.spec, tokens)))
        return times


def decode_bytes(spec: ModelSpec, batch: int, context: int) -> int:
    """What a step in bf16 has to read: every weight once (a tied embedding serves as the head), and the batch's KV."""
    assert spec.tied_embeddings, "an embedding of its own is not read whole"
    return spec.weight_bytes("bfloat16") + spec.kv_layout(32, "bfloat16").token_bytes * batch * context


def prefill_operations(spec: ModelSpec, tokens: int) -> int:
    """Floating-point operations of a prompt: matrices for every token, causal attention, the last one's head."""
    attention = 2 * spec.num_layers * spec.num_heads * spec.head_dim * tokens * (tokens + 1)
    head = spec.vocab_size * spec.hidden_size
    assert spec.tied_embeddings
    return 2 * (spec.num_parameters - head) * tokens + attention + 2 * head


def ratio(times: Times, peer: str) -> float:
    """How many times as fast as `peer` we are: the median of the rounds' own ratios (neighbours share the weather)."""
    return median(theirs / ours for theirs, ours in zip(times[peer], times[US], strict=True))


def row(label: str, times: Times, tokens: int, absent: dict[str, str]) -> list[str]:
    """tokens per second of each contender, and ours over each peer's."""
    cells = [label]
    for name in (US, HF, VLLM):
        if name in absent:
            cells.append(absent[name])
        else:
            cells.append(f"{tokens / median(times[name]):,.1f}" if name in times else "not asked")
    for peer in (HF, VLLM):
        cells.append(f"{ratio(times, peer):.2f}x" if peer in times else "-")
    cells += [f"{ratio(times, LIMIT):.0%}", f"{1e3 * median(times[US]):.1f}"]
    return cells


def run(core: int, rounds: int, points: list[str], vllm_python: str | None) -> tuple[dict[str, object], str]:
    spec = read_spec(resolve("demo"))
    decodes = [DECODE[point] for point in points if point in DECODE]
    prefills = [PREFILL[point] for point in points if point in PREFILL]
    kind = machine()
    with ExitStack() as stack:
        limits = stack.enter_context(Worker("benchmarks.engine_limits", core=core))
        workers, absent = contenders(stack, core, vllm_python)
        course = Course(workers, limits, rounds, spec)
        decoded: dict[tuple[int, int], Times] = {}
        for batch, context in decodes:
            say(f"decode, batch {batch}, context {context}")
            decoded[batch, context] = course.decode(batch, context)
        prefilled: dict[int, Times] = {}
        for tokens in prefills:
            say(f"prefill, {tokens} tokens")
            prefilled[tokens] = course.prefill(tokens)
    header = ["tokens/s", US, HF, VLLM, f"/ {HF}", f"/ {VLLM}", "of the limit", "ours, ms"]
    rows = [row(f"decode b{b}, context {c}", times, b, absent) for (b, c), times in decoded.items()]
    rows += [row(f"prefill {n}", times, n, absent) for n, times in prefilled.items()]
    bandwidth, gemm = median(course.bandwidths or [0]), median(course.gemms or [0])
    text = "\n".join(
        [
            describe(kind),
            f"one core; medians of {rounds} rounds in turns; bf16; SmolLM2-135M-Instruct",
            "",
            table(header, rows),
            "",
            f"Limits: the core reads {bandwidth / 1e9:.1f} GB/s and multiplies bf16 at {gemm / 1e9:,.0f} GFLOP/s.",
        ]
    )
    data: dict[str, object] = {
        "machine": kind,
        "rounds": rounds,
        "decode": [{"batch": b, "context": c, "seconds": times} for (b, c), times in decoded.items()],
        "prefill": [{"tokens": n, "seconds": times} for n, times in prefilled.items()],
        "absent": absent,
        "bandwidth": bandwidth,
        "gemm": gemm,
    }
    return data, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", metavar="PATH", help="interpreter of an environment with vLLM's CPU build")
    parser.add_argument("--core", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    every = [*DECODE, *PREFILL]
    parser.add_argument("--quick", action="store_true", help="context 256 and prompts up to 512 only")
    parser.add_argument("--points", metavar="A,B", help=f"only these, of {', '.join(every)}")
    parser.add_argument("--json", metavar="FILE|-")
    arguments = parser.parse_args()
    points = arguments.points.split(",") if arguments.points else QUICK if arguments.quick else every
    if unknown := set(points) - set(every):
        parser.error(f"--points: {', '.join(sorted(unknown))} is not one of {', '.join(every)}")
    data, text = run(arguments.core, arguments.rounds, points, arguments.vllm_python)
    report(data, text, arguments.json)


if __name__ == "__main__":
    main()
