from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve.errors import PlanError, UsageError
from distserve.plan import InstanceSpec, Plan, Policy, Role, default_plan, parse_memory

DESIGN = """
model = "facebook/opt-13b"
device = "a100-80g"

[[instances]]
role = "prefill"
tp = 2
count = 2
devices = [["node0:0", "node0:1"], ["node1:0", 3]]

[[instances]]
role = "decode"
pp = 2
kv_memory = "40GiB"

[[instances]]
role = "colocated"
policy = "prefill-first"
"""


def test_reads_every_key() -> None:
    plan = Plan.from_toml(DESIGN)
    assert plan.model == "facebook/opt-13b"
    assert plan.device == "a100-80g"
    assert plan.instances == (
        InstanceSpec(Role.PREFILL, tp=2, count=2, devices=(("node0:0", "node0:1"), ("node1:0", "node0:3"))),
        InstanceSpec(Role.DECODE, pp=2, kv_memory=40 << 30),
        InstanceSpec(Role.COLOCATED, policy=Policy.PREFILL_FIRST),
    )
    assert plan.num_devices == 4 + 2 + 1


def test_replicas_are_counted_by_role_through_all_specs() -> None:
    plan = Plan((InstanceSpec(Role.PREFILL, count=2), InstanceSpec(Role.DECODE), InstanceSpec(Role.PREFILL, tp=2)))
    assert [replica.name for replica in plan.replicas()] == ["prefill-0", "prefill-1", "decode-0", "prefill-2"]
    assert plan.replicas()[3].spec.tp == 2
    named = Plan.from_toml(DESIGN).replicas()
    assert [replica.devices for replica in named[:2]] == [("node0:0", "node0:1"), ("node1:0", "node0:3")]
    assert [replica.role for replica in named] == ["prefill", "prefill", "decode", "colocated"]


def test_default_plan_is_one_of_each_phase() -> None:
    assert [replica.name for replica in default_plan().replicas()] == ["prefill-0", "decode-0"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["no instances", "[[instances]]"]),
        ("x =", ["not TOML"]),
        ('modle = "m"', ["'modle'", "did you mean 'model'"]),
        ("model = 3", ["model = 3", "string"]),
        ("instances = 3", ["[[instances]]"]),
        ('[[instances]]\nroles = "prefill"', ["instances[1]", "'roles'", "did you mean 'role'"]),
        ("[[instances]]\ntp = 1", ["role is missing", "colocated"]),
        ('[[instances]]\nrole = "prefil"', ["prefil", 'did you mean "prefill"']),
        ('[[instances]]\nrole = "x"', ['one of "prefill", "decode", "colocated"']),
        ('[[instances]]\nrole = "prefill"', ["no decode", 'role = "decode"']),
        ('[[instances]]\nrole = "decode"', ["no prefill", 'role = "prefill"']),
        (
            '[[instances]]\nrole = "colocated"\n[[instances]]\nrole = "decode"',
            ["decode but no prefill", 'make them role = "colocated"'],
        ),
        ('[[instances]]\nrole = "colocated"\ncount = 0', ["count = 0", "at least 1"]),
        ('[[instances]]\nrole = "colocated"\ntp = -1', ["tp = -1"]),
        ('[[instances]]\nrole = "colocated"\npp = 1.5', ["pp = 1.5", "whole number"]),
        ('[[instances]]\nrole = "colocated"\ntp = true', ["tp = True", "whole number"]),
        ('[[instances]]\nrole = "decode"\npolicy = "chunked"', ["policy belongs to", "colocated"]),
        ('[[instances]]\nrole = "prefill"\nchunk_tokens = 5', ["chunk_tokens belongs to"]),
        ('[[instances]]\nrole = "colocated"\npolicy = "chunk"', ['did you mean "chunked"']),
        (
            '[[instances]]\nrole = "colocated"\npolicy = "prefill-first"\nchunk_tokens = 9',
            ["whole prompts", "remove one"],
        ),
        ('[[instances]]\nrole = "colocated"\ndevices = [["node0:0"], ["node0:1"]]', ["names 2 replicas", "count = 1"]),
        ('[[instances]]\nrole = "colocated"\ntp = 2\ndevices = [["node0:0"]]', ["has 2 ranks", "name 2"]),
        ('[[instances]]\nrole = "colocated"\ncount = 2\ndevices = [[0], ["node0:0"]]', ["node0:0 more than once"]),
        ('[[instances]]\nrole = "colocated"\ndevices = [["gpu-zero"]]', ["'gpu-zero'", "node0:1"]),
        ('[[instances]]\nrole = "colocated"\ndevices = ["node0:0"]', ["one list per replica"]),
        ('[[instances]]\nrole = "colocated"\ndevices = "node0:0"', ["one list per replica"]),
        ('[[instances]]\nrole = "colocated"\nkv_memory = "lots"', ["kv_memory", "'lots'", "2GiB"]),
    ],
)
def test_a_wrong_plan_is_refused_with_its_cure(text: str, words: list[str]) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.from_toml(text, "my.toml")
    message = str(caught.value)
    assert message.startswith("my.toml: ")
    assert "\n" not in message
    for word in words:
        assert word in message


def test_load_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"none\.toml: No such file"):
        Plan.load(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="not a text file"):
        Plan.load(tmp_path / "binary.toml")
    (tmp_path / "plan.toml").write_text(DESIGN)
    assert Plan.load(tmp_path / "plan.toml") == Plan.from_toml(DESIGN)


counts = st.integers(1, 4)
memories = st.none() | st.integers(2, 1 << 40) | st.floats(0.01, 1)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    free = iter(range(10_000))

    def spec(role: Role) -> InstanceSpec:
        tp, pp, count = draw(counts), draw(counts), draw(counts)
        named = draw(st.booleans())
        devices = tuple(tuple(f"n{i % 2}:{next(free)}" for i in range(tp * pp)) for _ in range(count)) if named else ()
        policy = draw(st.none() | st.sampled_from(Policy)) if role is Role.COLOCATED else None
        chunk = draw(st.none() | counts) if role is Role.COLOCATED and policy is not Policy.PREFILL_FIRST else None
        return InstanceSpec(role, tp, pp, count, policy, chunk, draw(st.none() | counts), draw(memories), devices)

    roles = [Role.PREFILL, Role.DECODE] * draw(st.integers(0, 2))
    roles += [Role.COLOCATED] * draw(st.integers(0 if roles else 1, 2))
    model = draw(st.none() | st.text(min_size=1).filter(lambda text: text.encode("utf-8", "ignore").decode() == text))
    specs = tuple(spec(role) for role in draw(st.permutations(roles)))
    return Plan(specs, model, draw(st.sampled_from([None, "cpu"])), draw(st.sampled_from([None, "4x A100, 80 GiB"])))


@given(plans())
def test_a_plan_written_and_read_is_the_same_plan(plan: Plan) -> None:
    assert Plan.from_toml(plan.to_toml()) == plan
    names = [replica.name for replica in plan.replicas()]
    assert len(set(names)) == len(names) == sum(spec.count for spec in plan.instances)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.2", 0.2), ("20%", 0.2), ("1", 1.0), (1, 1.0), (0.5, 0.5), ("2GiB", 2 << 30), ("2 gib", 2 << 30),
        ("1.5KiB", 1536), ("500MB", 500_000_000), ("4096", 4096), (4096, 4096), ("12B", 12), ("1TiB", 1 << 40),
    ],
)  # fmt: skip
def test_memory_is_a_share_or_bytes(text: str | float, value: float) -> None:
    parsed = parse_memory(text)
    assert parsed == value
    assert isinstance(parsed, float) == (value <= 1)


@pytest.mark.parametrize("text", ["", "0", "0%", "150%", "-1", "1.5", "2 gigs", "nan", "inf", "0.1B", True])
def test_other_memory_is_refused(text: str | float) -> None:
    with pytest.raises(UsageError, match="2GiB"):
        parse_memory(text)
