"""What a validation says at its end: tables, files, and the exit status. Measures nothing."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict
from typing import Any

from distserve.costs.base import Costs
from distserve.metrics import Record
from distserve.outputs import write_json, write_text
from distserve.validate import show
from distserve.validate.compare import Comparison, Runs
from distserve.validate.validation import Validation

_KEY = ("plan", "workload", "rate", "seed", "repeat")
_REQUEST = ("arrival", "prompt_tokens", "output_tokens", "ttft", "tpot", "status")
_PREDICTED = ("predicted_ttft", "predicted_tpot", "predicted_status")


def tell(validation: Validation) -> int:
    """Prints and writes; returns the exit status: 130 stopped, 1 a server failed or the error is above --within."""
    options = validation.options
    found = validation.compare()
    if not found.cells:
        show.say("nothing was measured")
        return 130 if validation.interrupted else 1
    console = show.console(stderr=options.json_out == "-")
    show.cells(found.cells, console)
    if found.capacities:
        show.capacities(found.capacities, options.goal, console)
    show.verdicts(found.verdicts, console)
    if found.as_it_was:
        console.print()
        show.verdicts(found.as_it_was, console, "the same, on the machine as fast as it was in each run")
    console.print(f"the client took {show.busy(found.cells)}", highlight=False)
    for note in found.notes:
        show.say(f"note: {note}")
    more = f": the same command measures them into {options.record}" if options.record is not None else ""
    if validation.missing:
        show.say(f"{validation.missing} of {len(validation.cells)} runs are not measured yet{more}")
    spoiled = sum(bool(run.spoiled) for runs in _once(found) for run in runs.measured)
    if spoiled:
        show.say(f"{spoiled} of {len(validation.cells)} runs were spoiled and count in no error{more}")
    if options.requests_out is not None:
        write_text(options.requests_out, rows(found))
    if options.plot is not None:
        from distserve.validate.plot import draw

        draw(found, options.goal, options.plot)
    if options.json_out is not None:
        write_json(options.json_out, _json(validation, found))
    return _status(validation, found)


def _status(validation: Validation, found: Comparison) -> int:
    if validation.interrupted:
        return 130
    if validation.failures:
        return 1
    within = validation.options.within
    return 1 if within is not None and found.attainment_error > within else 0


def rows(found: Comparison) -> str:
    """Every request of every run, as it was and as it was predicted."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_KEY, *_REQUEST, *_PREDICTED])
    for runs in _once(found):
        for run in runs.measured:
            for real, predicted in zip(run.records, runs.predicted, strict=True):
                ours = (_time(predicted.ttft), _time(predicted.tpot), predicted.status)
                writer.writerow([*run.key, *_request(real), *ours])
    return text.getvalue()


def _once(found: Comparison) -> list[Runs]:
    """Each run, however many SLOs judge it."""
    return list({id(cell.runs): cell.runs for cell in found.cells}.values())


def _request(record: Record) -> tuple[object, ...]:
    times = (_time(record.ttft), _time(record.tpot))
    return record.arrival, record.prompt_tokens, record.output_tokens, *times, record.status


def _time(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"


def _json(validation: Validation, found: Comparison) -> dict[str, Any]:
    recording = validation.recording
    return {
        "model": recording.model,
        "machine": recording.machine,
        "versions": recording.versions,
        "costs": _about(validation.costs),
        "goal": validation.options.goal,
        "plans": {name: plan.to_toml() for name, plan in recording.served.items()},
        **found.to_dict(),
        "not_measured": validation.missing,
        "failures": validation.failures,
        "interrupted": validation.interrupted,
    }


def _about(costs: Costs) -> dict[str, Any]:
    return {"name": costs.name, "dtype": costs.dtype, "engine": asdict(costs.engine)}
