"""The document docs/guides/paper.md, made of what experiments kept: every number in it comes from there. Knows no
simulator."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, cast

from experiments.paper import fig01, fig08, fig09, fig10, fig11, fig12, gains, placements, table2
from experiments.paper.lab import Lab
from experiments.paper.published import GOAL, cases

PAGE = Path(__file__).parent.parent.parent / "docs" / "guides" / "paper.md"


class Experiment(Protocol):
    """A module of a figure or table."""

    NAME: str
    TITLE: str

    def run(self, lab: Lab) -> dict[str, Any]:
        """Simulates, draws, writes its table; what it returns is kept."""
        ...

    def section(self, found: dict[str, Any]) -> str:
        """Its part of the document."""
        ...


# In the order in which they run: gains are made of figures 8 and 9.
EXPERIMENTS: dict[str, Experiment] = {
    module.NAME: cast(Experiment, module)
    for module in (fig01, fig08, fig09, gains, fig10, fig11, fig12, table2, placements)
}
_FIRST = gains.NAME  # what a reader comes for

_HEAD = """# The paper, simulated again

The figures and tables of Zhong et al., *DistServe* (OSDI 2024, arXiv 2401.09670 v3), beside what this project's
simulator says. `make paper` (`python -m experiments`) runs all of it, writes plots and tables to
experiments/results, and writes this page: no result in it is typed by hand. `python -m experiments fig08` runs
one part.

**What is compared.** *DistServe*: the paper's placement (table 3). *Whole prompts*: one colocated instance of the
baseline's parallelism that computes whole prompts before any decode step, as vLLM did then, with costs fitted to
vLLM 0.2.3; held against the paper's vLLM. *Chunked*: the same instance with chunked prefill, as engines work now,
on the costs of DistServe's own engine, so that only the scheduling differs; held against the paper's
DeepSpeed-MII, which splits prompts, too. *Whole prompts, same engine*: whole prompts on the costs of DistServe's
engine, which the paper does not have; it says how much of the gain over vLLM is the engine's. All are simulated
by the schedulers that serve live requests ([what the simulator is held against](../accuracy.md)).

**How long runs are.** The paper sent {fewest} to {most} requests per device. That is over before the KV memory is
full or a queue has settled. *As published* is such a run: every request counts, the mean of several draws.
*Steady* is thousands of requests, of which the first tenth and the last twentieth do not count. Above what a
system can bear there is no steady state: attainment is then near zero, and how near is a matter of the run's
length.

**Costs.** OPT-13B and OPT-66B: fits of A100 measurements. OPT-175B has none: its step times are estimated from the
A100's datasheet with the waits of engines of that time, so its absolute rates are worth less than the others'. Two
choices there are ours, and matter. Prompts of OPT-175B are batched up to the knee (section 4.3 of the paper); in
batches as large as those of the smaller models DistServe does clearly worse. And whole prompts on DistServe's engine
are left out for it, because the step times of both engines are the same estimate.
Attainment is joint (both targets), rates are per device, the goal is {goal:.0%}.
"""


def write(lab: Lab) -> None:
    PAGE.write_text(text(lab), encoding="utf-8")


def text(lab: Lab) -> str:
    """Of everything that was run."""
    sent = [case.requests_per_device for case in cases().values()]
    parts = [_HEAD.format(fewest=min(sent), most=max(sent), goal=GOAL)]
    for name in sorted(EXPERIMENTS, key=lambda name: name != _FIRST):
        found = lab.kept(name)
        if found is not None:
            experiment = EXPERIMENTS[name]
            picture = f"![{experiment.TITLE}](../../experiments/results/{name}.svg)"
            table = f"Every point: [{name}.csv](../../experiments/results/{name}.csv)."
            parts.append(f"## {experiment.TITLE}\n\n{picture}\n\n{experiment.section(found).strip()}\n\n{table}\n")
    return "\n".join(parts)
