"""Measures goodput on this machine and writes docs/goodput.md: `python -m experiments.live_goodput --costs FILE`.

Runs that the record file has are not measured again, so it can be stopped and started; `--seconds 0` measures nothing
and writes the document of what there is. Status 1: a contender did not start or died; 130: stopped."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from distserve import machine
from distserve.costs.choose import choose_costs
from distserve.validate import record as recordings
from distserve.validate.record import Recording
from experiments.live_goodput import figures, page
from experiments.live_goodput.cases import CASES, DURATION, RATES
from experiments.live_goodput.contenders import MODEL, OURS, VLLM, VLLM_APART
from experiments.live_goodput.measuring import Asked, measure
from experiments.live_goodput.results import rows

DATA = Path(__file__).parents[1] / "data"
DOCS = Path(__file__).parents[2] / "docs"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.live_goodput", description=__doc__)
    parser.add_argument("--costs", type=Path, default=DATA / "live_costs.json", help="what distserve profile wrote")
    parser.add_argument("--record", type=Path, default=DATA / "live_goodput.jsonl.gz", help="file of measured runs")
    parser.add_argument("--cases", default=",".join(case.name for case in CASES), help="of these, with commas")
    parser.add_argument("--vllm-python", metavar="PATH", help="interpreter of an environment with vLLM's CPU build")
    parser.add_argument("--vllm-apart", action="store_true", help="its own prefill and decode apart as well")
    parser.add_argument("--duration", type=float, default=DURATION, help="seconds of arrivals of a cell")
    parser.add_argument("--rates", type=int, default=RATES, help="so many of each case's, from the middle outwards")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="measure no longer than this")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of the document")
    given = parser.parse_args(arguments)
    wanted = given.cases.split(",")
    unknown = [name for name in wanted if name not in {case.name for case in CASES}]
    if unknown:
        parser.error(f"--cases {unknown[0]}: of {', '.join(case.name for case in CASES)}")
    costs = choose_costs(MODEL, "cpu", given.costs)
    if given.seconds > 0 and given.record.suffix == ".gz":
        parser.error(f"--record {given.record} is packed: name another file to measure into, or give --seconds 0")
    if given.vllm_apart and not given.vllm_python:
        parser.error("--vllm-apart: name vLLM's interpreter, too (--vllm-python)")
    if given.record.exists():
        recording = recordings.read(given.record)
    else:
        recording = Recording(given.record, MODEL, machine.fingerprint("cpu"), recordings.versions())
        recording.begin()
    status = 0
    if given.seconds > 0:
        if recording.machine != machine.fingerprint("cpu"):
            parser.error(f"--record {given.record} was measured on {recording.machine}: name another file")
        names = (*OURS, *_theirs(given.vllm_python, given.vllm_apart))
        cases = [case for case in CASES if case.name in wanted]
        measuring = measure(
            Asked(cases, names, given.duration, given.seconds, given.vllm_python, given.rates), costs, recording
        )
        status = 130 if measuring.interrupted else 1 if measuring.failures else 0
    print("asking the planner, writing the document", file=sys.stderr)
    found = [row for case in CASES if (row := rows(case, recording))]
    if found:
        (given.out / "images").mkdir(parents=True, exist_ok=True)
        figures.attainments(found, given.out / "images" / page.IMAGE)
    name = given.record.name if given.record.parent != DATA else f"experiments/data/{given.record.name}"
    (given.out / "goodput.md").write_text(page.text(recording, costs, name), encoding="utf-8")
    return status


def _theirs(python: str | None, apart: bool) -> tuple[str, ...]:
    """Contenders that are not ours. vLLM's own split is asked for by itself: see docs/measurements.md."""
    return () if python is None else (VLLM, VLLM_APART) if apart else (VLLM,)


if __name__ == "__main__":
    sys.exit(main())
