"""Figure 8: chatbot (ShareGPT) with OPT-13B, OPT-66B and OPT-175B."""

from __future__ import annotations

from typing import Any

from experiments.paper import attainment
from experiments.paper.lab import Lab

NAME = "fig08"
TITLE = "Figure 8: chatbot"
CASES = ("opt-13b-sharegpt", "opt-66b-sharegpt", "opt-175b-sharegpt")
# Why they differ, in words without numbers: the tables above them have those.
REASONS = {
    "opt-13b-sharegpt": """DistServe and vLLM follow the paper at its length of run. Where DistServe falls earlier
than the paper's, the decode GPU's KV memory has filled, late in the run; in steady state that is what ends it,
and within one step of the axis. Chunked prefill does better than DeepSpeed-MII at high rates, because it is given
the step times of DistServe's engine. Whole prompts on these step times, too, are far above vLLM: most of what
separates vLLM from DistServe here is the engine of that time (prompts padded to the longest, milliseconds of host
time a prompt), which the fits of vLLM 0.2.3 hold, and not that phases share a GPU.""",
    "opt-66b-sharegpt": """DistServe follows the paper at its length of run, and in steady state bears less than
half of it: the decode instance of the placement (tp 2, pp 2) keeps the KV of few requests beside its weights, and
a short run is over before it is full. Whole prompts fall later and then steeper than vLLM did: the step times of
vLLM on this model are published fits, and its habits (padding, host time) were observed with OPT-13B on one GPU
only. Colocated instances on DistServe's own step times bear more per device than the placement, because all of
their memory serves both phases.""",
    "opt-175b-sharegpt": """Costs are estimated from the datasheet, and it shows: the estimate is kind to one
instance of eight GPUs in one node (the baseline), for which the paper measured much less, and hard on a prefill
pipeline of three nodes, which is what binds DistServe here; in the paper it is decode. Only the shape of the
curves should be read.""",
}


def run(lab: Lab) -> dict[str, Any]:
    return attainment.run(lab, NAME, CASES)


def section(found: dict[str, Any]) -> str:
    return attainment.section(NAME, found, REASONS)
