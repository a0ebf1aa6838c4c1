"""The part of docs/accuracy.md about the same machine with its matrix tiles left alone: what is left of the errors
where other tenants can spoil less. Only recorded runs are read."""

from __future__ import annotations

from experiments.accuracy import live
from experiments.accuracy.live import DATA, Live

RUNS, COSTS = DATA / "live_runs_vectors.jsonl.gz", DATA / "live_costs_vectors.json"
TEXT = """
## The same machine without its matrix tiles

Is it the weather that spoils what is predicted ahead, or the simulator? `DISTSERVE_KERNELS=vectors`
([Environment](reference/environment.md)) leaves the tiles, which other tenants slow down most, alone, and multiplies
in a core's vector units. A prompt then takes 6 to 7 times as long, so the lengths are shorter here:
{workloads}. {slow} of the steps with prompts took more than 1.5 times what their costs say, by run up to {most}
(with tiles: {tiles}, up to {tiles_most}). {cells} cells, {runs} runs, measured and profiled as above
([live_runs_vectors.jsonl.gz](../experiments/data/live_runs_vectors.jsonl.gz),
[live_costs_vectors.json](../experiments/data/live_costs_vectors.json)).

Prompts are steadier then, and TTFT is predicted better ahead; but whoever computes on the other thread of a core slows
all of its work by a third, which is little for a prompt and much for a target of TPOT that is one and a half times
what an idle machine takes. On the machine as it was every target is met, with the other kernels as with these.

**Predicted ahead:**
"""


def text() -> str:
    found = live.live(RUNS, COSTS)
    slow, tiles = found.slow, live.live().slow
    keys = [run.key for run in found.recording.runs.values()]
    opening = TEXT.format(
        workloads=", ".join(dict.fromkeys(f"`{key.workload}`" for key in keys)),
        slow=f"{slow.all:.0%}",
        most=f"{slow.most:.0%}",
        tiles=f"{tiles.all:.0%}",
        tiles_most=f"{tiles.most:.0%}",
        cells=len({key[:3] for key in keys}),
        runs=len(keys),
    )
    return "\n\n".join(part.strip() for part in (opening, *_tables(found)) if part)


def _tables(found: Live) -> list[str]:
    return [
        live.verdicts(found.comparison.verdicts),
        "**Predicted on the machine as it was:**",
        live.verdicts(found.comparison.as_it_was),
        live.capacities(found.comparison),
        "What nobody can know ahead, here:",
        live.drawn(found),
    ]
