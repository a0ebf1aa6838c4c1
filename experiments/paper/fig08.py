"""Figure 8: chatbot (ShareGPT) with OPT-13B, OPT-66B and OPT-175B."""

from __future__ import annotations

from typing import Any

from experiments.paper import attainment
from experiments.paper.lab import Lab

NAME = "fig08"
TITLE = "Figure 8: chatbot"
CASES = ("opt-13b-sharegpt", "opt-66b-sharegpt", "opt-175b-sharegpt")


def run(lab: Lab) -> dict[str, Any]:
    return attainment.run(lab, NAME, CASES)


def section(found: dict[str, Any]) -> str:
    return attainment.section(NAME, found)
