"""A costs file to which one more parallelism of its model is added: whether that may be, and what comes of it. The
engine's habits and the machine stay as the file has them. Knows no worker.

So does KV memory, which a file says once, of a device, whatever the parallelism, as the first measurement had it: with
that instances are planned and imagined (`costs/memory.py`), and the plan that `distserve plan` writes says it, so that
each rank of a server has it. A server on a CPU that nobody tells (neither the plan nor --kv-memory) divides its default
among an instance's ranks instead: where such a plan would be imagined with another memory, that is said
(`other_memory`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distserve.costs.profile import Profile
from distserve.errors import UsageError
from distserve.profiler.assemble import Heading


def known(path: str, heading: Heading) -> dict[str, Any] | None:
    """The file's table; None: there is no file yet. Raises `UsageError` where it is no costs file, or one of something
    else."""
    if not Path(path).exists():
        return None
    contents = Profile.load(path).contents
    for what, theirs, ours in (
        ("the machine", contents.machine.fingerprint, heading.fingerprint),
        ("the device", contents.device, heading.device),
        ("the dtype", contents.dtype, heading.dtype),
        ("the block size", contents.engine.block_size, heading.block_size),
        ("the model", ", ".join(contents.entries), heading.model),
    ):
        if theirs != ours:
            raise UsageError(
                f"--add: {path} holds costs of {what} {theirs or 'that nobody names'}, these are of {ours}: give "
                "another --output, or leave --add out to write the file anew"
            )
    table: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    return table


def other_memory(old: dict[str, Any], heading: Heading) -> str:
    """A sentence where the file's KV memory of a device is not the one that was measured with; else empty."""
    theirs, ours = old.get("engine", {}).get("kv_memory"), heading.kv_memory
    if theirs == ours:
        return ""
    return (
        f"where a plan does not say kv_memory, these costs mean {_on_a_device(theirs)}; {heading.degree} was measured "
        f"with {_on_a_device(ours)}: say kv_memory in plans of such instances (distserve plan does)"
    )


def _on_a_device(memory: int | None) -> str:
    if memory is None:
        return "what the weights leave of a device"
    return f"{memory / 2**20:,.0f} MiB of KV on each device"


def merged(old: dict[str, Any], new: dict[str, Any], heading: Heading) -> dict[str, Any]:
    """`old` with the entry of `new`, which goes before one of the same parallelism."""
    by_degree = {**old["models"][heading.model], **new["models"][heading.model]}
    note = f"{heading.degree} measured on {heading.date} ({heading.versions}): {new['note']}"
    return {
        **old,
        "note": "; ".join(filter(None, (old.get("note", ""), note))),
        "models": {**old["models"], heading.model: by_degree},
    }
