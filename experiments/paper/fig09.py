"""Figure 9: code completion (HumanEval) and summarization (LongBench) with OPT-66B."""

from __future__ import annotations

from typing import Any

from experiments.paper import attainment
from experiments.paper.lab import Lab

NAME = "fig09"
TITLE = "Figure 9: code completion and summarization"
CASES = ("opt-66b-humaneval", "opt-66b-longbench")
# Why they differ, in words without numbers: the tables above them have those.
REASONS = {
    "opt-66b-humaneval": """DistServe and vLLM follow the paper, a little below and a little above it. The TTFT
target is not much longer than the computation of a prompt alone, so that milliseconds of host time move the
crossing. Answers are short and the KV memory stays empty: the paper's length of run and steady state agree.
DeepSpeed-MII falls much faster than chunked prefill does on DistServe's step times: its engine, not chunking,
must have been slow at short requests.""",
    "opt-66b-longbench": """DistServe follows the paper at its length of run. The fall of vLLM comes later in
ours, as with ShareGPT. Lengths are drawn from the paper's two histograms (the texts are not public in that form),
so that long prompts and long answers come together by chance only. In steady state the decode instance runs out
of KV memory, as with ShareGPT, at a rate that is still above what colocated instances bear.""",
}


def run(lab: Lab) -> dict[str, Any]:
    return attainment.run(lab, NAME, CASES)


def section(found: dict[str, Any]) -> str:
    return attainment.section(NAME, found, REASONS)
