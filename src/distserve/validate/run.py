"""`distserve validate`: chooses cells, measures those that no file has yet, and tells predicted beside measured.

Ctrl-C ends the measuring, not the command: whole cells are kept and compared. A cell that was running is not: half a
run is another run.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby

import uvloop

from distserve import machine, plots
from distserve.costs.base import Costs
from distserve.costs.choose import choose_costs
from distserve.costs.profile import Profile, ProfileCosts
from distserve.errors import DistserveError, UsageError
from distserve.interrupts import interruptible
from distserve.outputs import check_writable
from distserve.validate import grid, live, show, tell
from distserve.validate import record as recordings
from distserve.validate.grid import Lengths
from distserve.validate.options import DEMO_MODEL, RATES, WORKLOADS, ValidateOptions
from distserve.validate.record import Key, Recording
from distserve.validate.validation import Validation


def run(options: ValidateOptions) -> int:
    """The whole command; returns the exit status."""
    for option, path in (("--json", options.json_out), ("--requests-out", options.requests_out)):
        check_writable(option, path)
    plots.check("--plot", options.plot)
    if options.source is not None:
        validation = _read(options)
    else:
        validation = _begin(options)
        _choose(validation)
        _measure(validation)
    return tell.tell(validation)


def _read(options: ValidateOptions) -> Validation:
    assert options.source is not None
    recording = recordings.read(options.source)
    costs = _costs(options, recording.model, recording.machine)
    cells = [key for key in recording.runs if _asked(options, key)]
    if not cells:
        raise UsageError(f"{options.source} holds no run of the plans, workloads and rates that were asked for")
    return Validation(options, costs, recording, cells)


def _asked(options: ValidateOptions, key: Key) -> bool:
    plans = {grid.load_plan(name)[0] for name in options.plans}
    return (
        (not plans or key.plan in plans)
        and (not options.workloads or key.workload in options.workloads)
        and (not options.rates or key.rate in options.rates)
    )


def _begin(options: ValidateOptions) -> Validation:
    """With what is in the record file already."""
    plans = dict(grid.load_plan(name) for name in options.plans or grid.PLANS)
    if len(plans) < len(options.plans):
        raise UsageError("two --plan files have one name: the name tells them apart, rename one")
    named = {plan.model for plan in plans.values() if plan.model is not None}
    if options.model is None and len(named) > 1:
        raise UsageError(f"the plans are of several models ({', '.join(sorted(named))}): validate one after the other")
    model = options.model or next(iter(named), DEMO_MODEL)
    device = next((plan.device for plan in plans.values() if plan.device), None) or machine.device_name(
        machine.resolve_device("auto")
    )
    here = machine.fingerprint(device)
    check_writable("--record", options.record)
    recording = Recording(options.record, model, here, recordings.versions())
    if options.record is not None and options.record.exists():
        recording = recordings.read(options.record)
        if recording.model != model or recording.machine != here:
            raise UsageError(
                f"--record {options.record} holds runs of {recording.model} on {recording.machine}, not of {model} on "
                f"{here}: name another file"
            )
    workloads = {text: Lengths.load(text) for text in options.workloads or WORKLOADS}
    costs = _costs(options, model, here)
    recording.begin()
    validation = Validation(options, costs, recording)
    for name, plan in plans.items():
        served = grid.pinned(plan, costs, model, device)
        if name not in recording.given:
            recording.add_plan(name, plan, served)
        elif recording.given[name] != plan:
            raise UsageError(f"--record {options.record} has another plan {name}: rename the file, or record elsewhere")
    for text, whole in workloads.items():
        validation.lengths[text] = lengths = whole.clipped(costs.spec.max_model_len)
        for note in lengths.workload.notes:
            show.say(f"note: {text}: {note}")
    return validation


def _costs(options: ValidateOptions, model: str, here: str) -> Costs:
    """Says so where they are of another machine than the measurements."""
    assert options.costs is not None
    profile = Profile.load(options.costs)
    found = choose_costs(model, profile.device, options.costs)
    if isinstance(found, ProfileCosts):
        found.elsewhere = ()  # this machine's matter only where something is measured on it
    if warning := profile.elsewhere(here):
        show.say(f"warning: {warning.replace('this machine', 'the machine of the measurements')}")
    return found


def _choose(validation: Validation) -> None:
    """Rates and targets that nobody named."""
    options, recording = validation.options, validation.recording
    names = list(dict.fromkeys(grid.load_plan(name)[0] for name in options.plans or grid.PLANS))
    with show.steps("choosing rates and targets", len(names) * len(validation.lengths)) as done:
        for text, lengths in validation.lengths.items():
            slos = options.slos or recording.slos_of(text)
            for name in names:
                chosen = recording.chosen.get((name, text))
                if chosen is None or not (chosen.rates or options.rates):
                    plan = recording.served[name]
                    chosen = grid.choose(
                        plan, lengths.workload, validation.costs, rates=options.rates, slos=slos, goal=options.goal,
                        number=RATES,
                    )  # fmt: skip
                    # rates that were asked for are this command's, and no choice to keep
                    recording.add_chosen(name, text, replace(chosen, rates=() if options.rates else chosen.rates))
                slos = slos or chosen.slos  # one workload has the same targets whatever serves it
                done()

    def rates(plan: str, workload: str) -> Sequence[float]:
        return options.rates or recording.chosen[plan, workload].rates

    validation.cells = grid.cells(names, list(validation.lengths), rates, options.seed, options.repeats)


# -- measuring --------------------------------------------------------------------------------------------------------


def _measure(validation: Validation) -> None:
    options, left = validation.options, validation.left
    about = live.seconds_of(left, options.duration, options.requests)
    have = len(validation.cells) - len(left)
    show.say(
        f"{len(validation.cells)} runs{f', {have} of them measured before' if have else ''}; measuring takes about "
        f"{show.minutes(min(about, options.time))}"
    )
    if not left:
        return
    gc.collect()
    gc.freeze()  # a collection that walks every workload would stop the clock-reader for milliseconds
    validation.interrupted = uvloop.run(interruptible(partial(_all_plans, validation)))
    if validation.interrupted:
        show.say("stopped; what was measured is compared")


async def _all_plans(validation: Validation) -> None:
    options = validation.options
    deadline = time.monotonic() + options.time
    for (name, _), cells in groupby(validation.left, key=lambda key: (key.plan, key.repeat)):
        mine = list(cells)
        if validation.out_of_time or _too_long(validation, mine[:1], deadline):
            return
        try:
            async with live.site(validation.recording.served[name], url=options.url, seed=options.seed) as site:
                await site.warm_up(validation.lengths[mine[0].workload].workload)
                for key in mine:
                    if _too_long(validation, [key], deadline):
                        break
                    await _one(validation, site, key)
        except DistserveError as error:
            if isinstance(error, UsageError):
                raise
            validation.failures.append(str(error))
            show.say(f"error: {error}")


async def _one(validation: Validation, site: live.Site, key: Key) -> None:
    options = validation.options
    left = validation.left
    number = len(validation.cells) - len(left) + 1
    rest = live.seconds_of(left, options.duration, options.requests)
    title = f"{number} of {len(validation.cells)} ({show.minutes(rest)} left): {key}"
    workload = grid.offered(key, validation.lengths[key.workload].workload, options.duration, options.requests)
    measured = await site.measure(key, workload, title)
    if measured is None:
        raise asyncio.CancelledError
    validation.recording.add(measured)
    validation.fresh.add(key)
    if measured.disturbed:
        show.say(
            f"warning: {key}: {measured.spoiled} meanwhile: it counts in no error; measure again when all is quiet"
        )
    for warning in measured.warnings:
        print(f"distserve: warning: {key}: {warning}", file=sys.stderr)


def _too_long(validation: Validation, cells: Sequence[Key], deadline: float) -> bool:
    options = validation.options
    validation.out_of_time = (
        time.monotonic() + live.seconds_of(cells, options.duration, options.requests) - 12.0 > deadline
    )
    return validation.out_of_time
