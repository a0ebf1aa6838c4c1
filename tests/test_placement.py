import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve.errors import PlanError
from distserve.placement import place
from distserve.plan import InstanceSpec, Plan, Role, default_plan


def colocated(*specs: InstanceSpec) -> Plan:
    return Plan(specs)


def one(**keys: object) -> InstanceSpec:
    return InstanceSpec(Role.COLOCATED, **keys)  # type: ignore[arg-type]


def test_two_devices_one_each() -> None:
    placement = place(default_plan(), [0, 1], share=False)
    assert placement.ranks == {"prefill-0": ((0,),), "decode-0": ((1,),)}
    assert placement.warnings == ()


def test_a_single_device_is_shared_and_said() -> None:
    placement = place(default_plan(), [7], share=True)
    assert placement.ranks == {"prefill-0": ((7,),), "decode-0": ((7,),)}
    assert len(placement.warnings) == 1
    assert "prefill-0 and decode-0 share device 7" in placement.warnings[0]


def test_without_sharing_too_few_devices_are_refused() -> None:
    with pytest.raises(PlanError, match=r"the plan needs 2 devices but this machine has 1 .* lower tp, pp or count"):
        place(default_plan(), [0], share=False)


def test_ranks_of_one_instance_never_share() -> None:
    with pytest.raises(PlanError, match="colocated-0 needs 4 devices but this machine has 2"):
        place(colocated(one(tp=2, pp=2)), [0, 1], share=True)


def test_ranks_of_one_instance_crowd_where_they_may() -> None:
    placement = place(colocated(one(tp=3), one()), [0, 1], share=True, crowd=True, spread=True)
    assert placement.ranks == {"colocated-0": ((0,), (1,), (0,)), "colocated-1": ((1,),)}
    assert [warning.partition(":")[0] for warning in placement.warnings] == [
        "2 ranks of colocated-0 share device 0",
        "colocated-0 and colocated-1 share device 1",
    ]


def test_spread_gives_away_every_core() -> None:
    placement = place(default_plan(), range(5), share=True, spread=True)
    assert placement.ranks == {"prefill-0": ((0, 1, 2),), "decode-0": ((3, 4),)}


def test_named_devices_are_kept_and_others_get_the_rest() -> None:
    plan = colocated(one(count=2), one(devices=(("node0:0",),)))
    placement = place(plan, [0, 1, 2], share=False)
    assert placement.ranks == {"colocated-0": ((1,),), "colocated-1": ((2,),), "colocated-2": ((0,),)}


@pytest.mark.parametrize(("name", "words"), [("node0:4", "has devices 0-1, 3"), ("node1:0", "this machine is node0")])
def test_a_device_that_is_not_here_is_refused(name: str, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        place(colocated(one(devices=((name,),))), [0, 1, 3], share=True)


@given(
    counts=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=4),
    num_devices=st.integers(1, 40),
    share=st.booleans(),
    spread=st.booleans(),
)
def test_every_rank_has_a_device_and_shares_only_when_allowed(
    counts: list[tuple[int, int]], num_devices: int, share: bool, spread: bool
) -> None:
    plan = colocated(*(one(tp=tp, count=count) for tp, count in counts))
    try:
        placement = place(plan, range(num_devices), share=share, spread=spread)
    except PlanError:
        assert num_devices < plan.num_devices
        assert not share or num_devices < max(tp for tp, _ in counts)
        return
    for replica in plan.replicas():
        ranks = placement.ranks[replica.name]
        assert len(ranks) == replica.spec.num_ranks
        used = [index for rank in ranks for index in rank]
        assert len(set(used)) == len(used)
        assert all(rank and set(rank) <= set(range(num_devices)) for rank in ranks)
    used = [index for ranks in placement.ranks.values() for rank in ranks for index in rank]
    assert bool(placement.warnings) == (len(set(used)) < len(used))
    if plan.num_devices <= num_devices:
        assert not placement.warnings
        assert not spread or sorted(used) == list(range(num_devices))
