"""Figure 9: code completion (HumanEval) and summarization (LongBench) with OPT-66B."""

from __future__ import annotations

from typing import Any

from experiments.paper import attainment
from experiments.paper.lab import Lab

NAME = "fig09"
TITLE = "Figure 9: code completion and summarization"
CASES = ("opt-66b-humaneval", "opt-66b-longbench")


def run(lab: Lab) -> dict[str, Any]:
    return attainment.run(lab, NAME, CASES)


def section(found: dict[str, Any]) -> str:
    return attainment.section(NAME, found)
