"""What it costs to compute a model with several ranks on one host: memory of a rank, sums, hand-overs, whole steps.

    python -m benchmarks.ranks [--cores 0 1] [--rounds 5] [--only memory,links,steps]
                               [--models demo,8-heads] [--json FILE|-]

- memory: a rank by itself loads its part of the demo model, from its GGUF file and from safetensors (`export_demo`),
  and its memory is read from /proc: the peak while loading and what is left, less what it had before. Beside it: the
  bytes of the parameters that it holds. For every rank of (tp, pp) = (1, 1), (3, 1), (1, 2), (1, 3), (3, 2).
- links: two ranks on two cores sum, or hand over, tensors as a step of 1, 32 and 512 tokens has them. Over the memory
  that distserve uses on one host, and over torch.distributed with gloo. Medians over the rounds.
- steps: instances driven without scheduler and gateway (`ranks_instance.py`), all ready before the first round, in each
  round every one in turn; figures are medians over the rounds, ratios medians of each round's ratio to one rank on one
  core. The demo model has 9 heads, which two ranks cannot share; so tp = 2 computes a model of random weights that is
  like it but for 8 heads over 4 KV heads and a hidden size of 512, and one core computes that model beside it.
"""

from __future__ import annotations

import argparse
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.engine import demo_folder
from benchmarks.harness import OUT, Worker, describe, machine, report, say, table
from distserve.engine.hub import resolve

DEGREES = [(1, 1), (3, 1), (1, 2), (1, 3), (3, 2)]
ROWS = (1, 32, 512)  # tokens of a step
WIDTH = 576  # hidden size of the demo model
CONTEXT, STEPS = 128, 24
INSTANCES: dict[str, tuple[str, ...]] = {"one rank": (), "pp 2": ("--pp", "2"), "tp 2": ("--tp", "2")}
MIB = 2**20


def eight_heads() -> Path:
    """The model of random weights, written at the first call."""
    folder = OUT / "eight-heads"
    if not (folder / "model.safetensors").exists():
        import torch
        import transformers

        config = transformers.LlamaConfig(
            vocab_size=49152,
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def rank(model: Path, tp: int, pp: int, number: int, core: int, *more: str) -> Worker:
    arguments = ("--tp", str(tp), "--pp", str(pp), "--rank", str(number), *more)
    return Worker("benchmarks.ranks_rank", str(model), *arguments, core=core)


def measure_memory(core: int) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for kind, model in (("GGUF", resolve("demo")), ("safetensors", demo_folder())):
        for tp, pp in DEGREES:
            for number in range(tp * pp):
                with tempfile.TemporaryDirectory() as folder:
                    say(f"memory: {kind}, tp {tp}, pp {pp}, rank {number}")
                    with rank(model, tp, pp, number, core, "--meeting", f"{folder}/meeting") as worker:
                        memory: Any = worker.ask("memory")
                found.append({"kind": kind, "tp": tp, "pp": pp, "rank": number, **memory})
    return found


def both(workers: list[Worker], do: str, **arguments: object) -> list[Any]:
    """Asks two ranks at once."""
    with ThreadPoolExecutor(len(workers)) as threads:
        return list(threads.map(lambda worker: worker.ask(do, **arguments), workers))


def measure_links(cores: list[int], rounds: int) -> dict[str, dict[int, list[float]]]:
    """Seconds by what, by rows of a step."""
    found: dict[str, dict[int, list[float]]] = {}
    for how, more in (("shared memory", ()), ("gloo", ("--gloo",))):
        for what, (tp, pp) in (("sums", (2, 1)), ("hand_over", (1, 2))):
            say(f"links: {what} over {how}")
            with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
                options = ("--meeting", f"{folder}/meeting", *more)
                # A worker answers when it is ready, and gloo's ranks are when all are: so they start together.
                with ThreadPoolExecutor(2) as threads:
                    starts = [threads.submit(rank, eight_heads(), tp, pp, i, cores[i], *options) for i in range(2)]
                    workers = [stack.enter_context(start.result()) for start in starts]
                times: dict[int, list[float]] = {rows: [] for rows in ROWS}
                for turn in range(rounds + 1):
                    for rows in ROWS:
                        answers = both(workers, what, rows=rows, width=WIDTH, count=50)
                        if what == "sums":
                            seconds = max(answers)
                        else:
                            seconds = median(there - sent for sent, there in zip(*answers, strict=True))
                        if turn:
                            times[rows].append(seconds)
                found[f"{what.replace('_', '-')}, {how}"] = times
    return found


# Of each point: what is opened first, what is timed, and its options.
POINTS: dict[str, tuple[dict[str, int] | None, str, dict[str, int]]] = {
    "decode, 1 sequence": ({"batch": 1, "groups": 1, "context": CONTEXT}, "decode", {"steps": STEPS}),
    "decode, 32 in one batch": ({"batch": 32, "groups": 1, "context": CONTEXT}, "decode", {"steps": STEPS}),
    "decode, 16 in each of 2 batches": ({"batch": 16, "groups": 2, "context": CONTEXT}, "decode", {"steps": STEPS}),
    "decode, 32 in each of 2 batches": ({"batch": 32, "groups": 2, "context": CONTEXT}, "decode", {"steps": STEPS}),
    "a prompt of 512 alone": (None, "latency", {"tokens": 512}),
    "prompts of 512, one behind the other": (None, "prefill", {"tokens": 512, "count": 6}),
}


def measure_steps(models: list[str], cores: list[int], rounds: int) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Seconds by model, by point, by instance."""
    two_stages = tuple(name for name in INSTANCES if name != "tp 2")
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for name in models:
        path, instances = (resolve("demo"), two_stages) if name == "demo" else (eight_heads(), tuple(INSTANCES))
        with ExitStack() as stack:
            workers = {}
            for instance in instances:
                say(f"starting {name}, {instance}")
                used = cores[-1:] if instance == "one rank" else cores
                arguments = (*INSTANCES[instance], "--cores", *map(str, used))
                worker = Worker("benchmarks.ranks_instance", str(path), *arguments, core=used[-1])
                workers[instance] = stack.enter_context(worker)
            found[name] = {point: measure_point(point, workers, rounds) for point in POINTS}
    return found


def measure_point(point: str, workers: dict[str, Worker], rounds: int) -> dict[str, list[float]]:
    """Seconds by instance. One round that is not counted goes before."""
    say(point)
    opened, do, options = POINTS[point]
    if opened is not None:
        for worker in workers.values():
            worker.ask("open", **opened)
    times: dict[str, list[float]] = {instance: [] for instance in workers}
    for turn in range(rounds + 1):
        for instance, worker in workers.items():
            seconds = worker.seconds(do, **options)
            if turn:
                times[instance].append(seconds)
    return times


def memory_table(memory: list[dict[str, Any]]) -> str:
    """One row an instance: its ranks' worst."""
    rows = []
    for kind in ("GGUF", "safetensors"):
        for tp, pp in DEGREES:
            ranks = [m for m in memory if (m["kind"], m["tp"], m["pp"]) == (kind, tp, pp)]
            over = max(m["peak"] - m["share"] for m in ranks)
            shares = [m["share"] / MIB for m in ranks]
            rows.append(
                [
                    f"{kind}, tp {tp}, pp {pp}",
                    f"{min(shares):.0f} to {max(shares):.0f} MiB",
                    f"{max(m['peak'] for m in ranks) / MIB:.0f} MiB",
                    f"{over / MIB:.0f} MiB",
                    f"{max(m['left'] - m['share'] for m in ranks) / MIB:.0f} MiB",
                ]
            )
    return table(["of each rank", "weights", "peak of loading", "over its weights", "left over them"], rows)


def links_table(links: dict[str, dict[int, list[float]]]) -> str:
    rows = [[what, *(f"{1e6 * median(times[n]):,.0f}" for n in ROWS)] for what, times in links.items()]
    return table(["microseconds", *(f"[{n}, {WIDTH}]" for n in ROWS)], rows)


def steps_table(steps: dict[str, dict[str, dict[str, list[float]]]]) -> str:
    rows = []
    for name, points in steps.items():
        for point, instances in points.items():
            one = instances["one rank"]
            cells = [f"{name}: {point}", f"{1e3 * median(one):.2f}"]
            for instance in ("pp 2", "tp 2"):
                if times := instances.get(instance):
                    ratio = median(a / b for a, b in zip(one, times, strict=True))
                    cells += [f"{1e3 * median(times):.2f}", f"{ratio:.2f}x"]
                else:
                    cells += ["-", "-"]
            rows.append(cells)
    return table(["ms a batch", "one rank", "pp 2", "as fast", "tp 2", "as fast"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, nargs=2, default=[0, 1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="memory,links,steps")
    parser.add_argument("--models", default="demo,8-heads", help="whose steps are measured")
    parser.add_argument("--json", metavar="FILE|-")
    arguments = parser.parse_args()
    kind, wanted = machine(), arguments.only.split(",")
    data: dict[str, object] = {"machine": kind, "rounds": arguments.rounds}
    texts = [describe(kind)]
    if "memory" in wanted:
        memory = measure_memory(arguments.cores[-1])
        data["memory"] = memory
        texts.append(memory_table(memory))
    if "links" in wanted:
        links = measure_links(arguments.cores, arguments.rounds)
        data["links"] = links
        texts.append(links_table(links))
    if "steps" in wanted:
        steps = measure_steps(arguments.models.split(","), arguments.cores, arguments.rounds)
        data["steps"] = steps
        texts.append(steps_table(steps))
    report(data, "\n\n".join(texts), arguments.json)


if __name__ == "__main__":
    main()
