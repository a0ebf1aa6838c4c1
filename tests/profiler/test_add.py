"""One more parallelism in a costs file: what stays, what comes, and what does not fit together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.profiler.test_assemble import HEADING, findings

from distserve.costs import format
from distserve.costs.profile import Profile
from distserve.errors import UsageError
from distserve.plan import InstanceSpec, Plan, Role
from distserve.profiler import add, assemble
from distserve.profiler.assemble import Heading
from distserve.sim.sizes import sized

PIPELINE = replace(HEADING, degree="1x2", kv_memory=1 << 29)  # as a server on a CPU has it: its default by ranks


def table(heading: Heading) -> dict[str, Any]:
    return assemble.table(findings(), heading)


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "costs.json"
    path.write_text(format.text(table(HEADING)))
    return str(path)


def test_a_file_that_is_not_there_is_not_known(tmp_path: Path) -> None:
    assert add.known(str(tmp_path / "none.json"), HEADING) is None


def test_what_is_known_stays_and_the_new_parallelism_comes(file: str) -> None:
    old = add.known(file, PIPELINE)
    assert old is not None
    whole = add.merged(old, table(PIPELINE), PIPELINE)
    assert set(whole["models"]["demo"]) == {"1x1", "1x2"}
    assert whole["engine"] == old["engine"]
    assert whole["machine"] == old["machine"]
    assert whole["note"].startswith(old["note"])
    assert "1x2 measured on 2026-11-22 (none)" in whole["note"]
    again = add.merged(whole, table(PIPELINE), PIPELINE)
    assert again["models"] == whole["models"]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"fingerprint": "another"}, "the machine"),
        ({"device": "cuda"}, "the device"),
        ({"dtype": "float32"}, "the dtype"),
        ({"block_size": 16}, "the block size"),
        ({"model": "gpt2"}, "the model"),
    ],
)
def test_costs_of_something_else_are_refused(file: str, change: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError, match=f"holds costs of {what} .* give another --output"):
        add.known(file, replace(HEADING, **change))


def test_kv_memory_of_a_device_is_the_files_whatever_the_parallelism(file: str) -> None:
    """What is imagined is what a plan says and a server then has: each rank has it, in one stage or in two."""
    old = add.known(file, PIPELINE)
    assert old is not None
    whole = json.loads(format.text(add.merged(old, table(PIPELINE), PIPELINE)))
    costs = Profile.from_dict(whole, file).costs("demo")
    for pp in (1, 2):
        layers = -(-costs.spec.num_layers // pp)
        block = 32 * 23_040 * layers // costs.spec.num_layers
        assert costs.kv_blocks(1, pp) == (1 << 30) // block
        assert costs.kv_blocks(1, pp, 1 << 29) == (1 << 29) // block
    written = sized(Plan((InstanceSpec(Role.PREFILL, pp=2), InstanceSpec(Role.DECODE))), costs)
    assert [spec.kv_memory for spec in written.instances] == [1 << 30, 1 << 30]


def test_who_measured_with_another_kv_memory_is_told(file: str) -> None:
    old = add.known(file, HEADING)
    assert old is not None
    assert add.other_memory(old, replace(PIPELINE, kv_memory=1 << 30)) == ""
    said = add.other_memory(old, PIPELINE)
    assert "mean 1,024 MiB of KV on each device; 1x2 was measured with 512 MiB" in said
    assert "what the weights leave" in add.other_memory(old, replace(PIPELINE, kv_memory=None))
    del old["engine"]["kv_memory"]
    assert add.other_memory(old, replace(PIPELINE, kv_memory=None)) == ""
    assert "mean what the weights leave of a device; 1x2 was measured with 512 MiB" in add.other_memory(old, PIPELINE)
