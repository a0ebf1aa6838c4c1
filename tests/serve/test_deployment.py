"""From a plan to instances of this machine, also of a machine with GPUs that is not here."""

from __future__ import annotations

from dataclasses import replace

import pytest

from distserve import machine
from distserve.errors import PlanError, UsageError
from distserve.plan import InstanceSpec, Plan, Role, default_plan
from distserve.serve.config import InstanceConfig, decode_config, encode_config
from distserve.serve.deployment import starts
from distserve.serve.options import ServeOptions
from distserve.serve.pace import FIRST, FLOOR, SLACK, Pace
from distserve.specs import ModelSpec

GIB = 1 << 30
SPEC = ModelSpec(
    family="llama",
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    hidden_size=4096,
    ffn_size=14336,
    vocab_size=128_256,
    max_model_len=8192,
)


def configs(options: ServeOptions, plan: Plan) -> list[InstanceConfig]:
    found = [start.configure(1, "gateway", "notices") for start in starts(options, plan, "model", SPEC)]
    assert [decode_config(encode_config(config)) for config in found] == found
    return found


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cores", lambda: [0, 1, 2, 3])
    monkeypatch.setattr(machine, "memory", lambda: 64 * GIB)
    monkeypatch.setattr(machine, "gpus", lambda: 0)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: 2)
    monkeypatch.setattr(machine, "gpu_memory", lambda index: 80 * GIB)


@pytest.mark.usefixtures("four_cores")
def test_cores_are_shared_out() -> None:
    prefill, decode = configs(ServeOptions(), default_plan())
    assert (prefill.name, prefill.role, prefill.engine.cores) == ("prefill-0", Role.PREFILL, (0, 1))
    assert (decode.name, decode.role, decode.engine.cores) == ("decode-0", Role.DECODE, (2, 3))
    assert prefill.engine.kv_bytes == machine.DEFAULT_KV


@pytest.mark.usefixtures("four_cores")
def test_kv_memory_in_bytes_and_as_a_share_and_the_plan_goes_first() -> None:
    plan = Plan((InstanceSpec(Role.PREFILL, kv_memory="3GiB"), InstanceSpec(Role.DECODE)))  # type: ignore[arg-type]
    prefill, decode = configs(ServeOptions(kv_memory=0.125), plan)
    assert (prefill.engine.kv_bytes, decode.engine.kv_bytes) == (3 * GIB, 8 * GIB)


@pytest.mark.usefixtures("four_cores")
def test_more_than_the_machine_has_is_refused() -> None:
    with pytest.raises(UsageError, match="lower --kv-memory"):
        configs(ServeOptions(kv_memory=40 * GIB), default_plan())
    with pytest.raises(UsageError, match="at most 8192"):
        configs(ServeOptions(max_model_len=9000), default_plan())
    with pytest.raises(PlanError, match="no block"):
        configs(ServeOptions(kv_memory=1000), default_plan())
    with pytest.raises(UsageError, match="no CUDA device"):
        configs(ServeOptions(device="cuda"), default_plan())


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_each() -> None:
    prefill, decode = configs(ServeOptions(), default_plan())
    assert (prefill.engine.device, decode.engine.device) == ("cuda:0", "cuda:1")
    weights = SPEC.weight_bytes("bfloat16")
    assert prefill.engine.kv_bytes == int(0.85 * 80 * GIB) - weights - 2 * GIB
    assert not any(start.forkable for start in starts(ServeOptions(), default_plan(), "model", SPEC))


@pytest.mark.usefixtures("two_gpus")
def test_instances_that_share_a_gpu_share_its_memory() -> None:
    plan = Plan((InstanceSpec(Role.PREFILL, devices=[["0"]]), InstanceSpec(Role.DECODE, count=2)))  # type: ignore[arg-type]
    found = configs(ServeOptions(), plan)
    assert [config.engine.device for config in found] == ["cuda:0", "cuda:1", "cuda:1"]
    assert found[1].engine.kv_bytes == int(0.85 * 80 * GIB / 2) - SPEC.weight_bytes("bfloat16") - 2 * GIB


@pytest.mark.usefixtures("four_cores")
def test_ranks_have_cores_of_their_own_while_there_are_enough(caplog: pytest.LogCaptureFixture) -> None:
    plan = Plan((InstanceSpec(Role.PREFILL, tp=2), InstanceSpec(Role.DECODE)))
    prefill, decode = configs(ServeOptions(), plan)
    assert (prefill.engine.tp, prefill.engine.pp, prefill.engine.ranks) == (2, 1, ((0, 1), (2,)))
    assert (decode.engine.ranks, decode.engine.cores) == ((), (3,))
    assert [prefill.engine.of_rank(rank).cores for rank in (0, 1)] == [(0, 1), (2,)]
    assert (prefill.engine.kv_bytes, decode.engine.kv_bytes) == (machine.DEFAULT_KV // 2, machine.DEFAULT_KV)
    assert not caplog.records


@pytest.mark.usefixtures("four_cores")
def test_a_plan_that_was_chosen_by_another_machines_costs_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    configs(ServeOptions(), replace(default_plan(), machine=machine.fingerprint("cpu")))
    assert not caplog.records
    configs(ServeOptions(), replace(default_plan(), machine="64 cores of a kind, 512 GiB"))
    assert "another machine (64 cores of a kind, 512 GiB)" in caplog.text
    assert "distserve profile" in caplog.text


@pytest.mark.usefixtures("four_cores")
def test_more_ranks_than_cores_share_them_and_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    plan = Plan((InstanceSpec(Role.PREFILL, tp=2, pp=3), InstanceSpec(Role.DECODE)))
    prefill, decode = configs(ServeOptions(), plan)
    assert prefill.engine.ranks == ((0,), (1,), (2,), (3,), (0,), (1,))
    assert decode.engine.cores == (2,)
    assert "2 ranks of prefill-0 share device 0" in caplog.text
    assert "prefill-0 and decode-0 share device 2" in caplog.text


@pytest.mark.usefixtures("two_gpus")
def test_ranks_of_an_instance_have_a_gpu_each_or_are_refused() -> None:
    plan = Plan((InstanceSpec(Role.COLOCATED, pp=2),))
    (config,) = configs(ServeOptions(), plan)
    assert [config.engine.of_rank(rank).device for rank in (0, 1)] == ["cuda:0", "cuda:1"]
    table = SPEC.vocab_size * SPEC.hidden_size * 2
    weights = (SPEC.weight_bytes("bfloat16") - 2 * table) // 2 + table
    assert config.engine.kv_bytes == int(0.85 * 80 * GIB) - weights - 2 * GIB
    with pytest.raises(PlanError, match="colocated-0 needs 4 devices but this machine has 2"):
        configs(ServeOptions(), Plan((InstanceSpec(Role.COLOCATED, tp=2, pp=2),)))


@pytest.mark.usefixtures("four_cores")
def test_a_block_must_fit_each_rank() -> None:
    plan = Plan((InstanceSpec(Role.COLOCATED, tp=2, pp=3),))
    layout = SPEC.kv_layout(32, "bfloat16")
    need = layout.block_bytes // 2 * 11 // 32
    assert configs(ServeOptions(kv_memory=need), plan)[0].engine.kv_bytes == need
    with pytest.raises(PlanError, match=f"at least {need} bytes on each rank"):
        configs(ServeOptions(kv_memory=need - 1), plan)


def test_pace_expects_what_it_has_seen_and_no_less_than_a_floor() -> None:
    pace = Pace()
    assert pace.expected(1) == FIRST
    pace.record(8, 0.04)
    assert pace.expected(8) == FLOOR
    assert pace.expected(8 + 40 * 100) == pytest.approx(SLACK * 0.04 / 40 * (40 + 40 * 100))
    for _ in range(1000):
        pace.record(8, 0.0001)
    assert pace.expected(1_000_000) == pytest.approx(SLACK * 0.0001 / 40 * 1_000_032, rel=0.1)
