"""The links that are served with: what they bring together, in whatever order ranks come, and that nothing hangs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.gloo_rank import PROMPT
from tests.engine.ranks import PATIENCE, Meeting, Ranks, ThreadLinks, all_places
from tests.engine.support import CPU, make_checkpoint
from torch import Tensor

from distserve.engine import host_links
from distserve.engine.collectives import ALONE, connect
from distserve.engine.host_links import HostLinks
from distserve.engine.parallel import Place
from distserve.sharding import Sharding

WIDE: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 96, "num_attention_heads": 6, "num_key_value_heads": 6}
NATIVE = host_links.library()
needs_library = pytest.mark.skipif(NATIVE is None, reason="no Linux or no compiler: torch.distributed links the ranks")


def meet(folder: Path, tp: int, pp: int) -> list[HostLinks]:
    """Links of all ranks, to be used from a thread each."""
    assert NATIVE is not None
    sharding = Sharding(tp, (1,) * pp, tp)
    return [HostLinks(NATIVE, Place(sharding, rank), folder / "links") for rank in range(tp * pp)]


def at_once(calls: list[Callable[[], list[Tensor]]]) -> list[list[Tensor]]:
    with ThreadPoolExecutor(len(calls)) as threads:
        return [future.result(PATIENCE) for future in [threads.submit(call) for call in calls]]


@needs_library
@settings(max_examples=30)
@given(data=st.data())
def test_sums_and_gathers_in_any_pieces(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Many in a row, short and longer than a slot; every rank does the same, at its own pace."""
    tp = data.draw(st.integers(2, 4))
    works = data.draw(st.lists(st.tuples(st.sampled_from(["sum", "gather"]), st.integers(1, 5)), max_size=8))
    widths = data.draw(st.lists(st.integers(1, 40), min_size=tp, max_size=tp))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_links, "_SLOT", data.draw(st.sampled_from([7, 64])))
        ranks = meet(tmp_path_factory.mktemp("links"), tp, 1)

    def numbers(index: int, work: int, rows: int, width: int) -> Tensor:
        return torch.randn(rows, width, generator=torch.Generator().manual_seed(100 * work + index))

    def work_at(links: HostLinks) -> list[Tensor]:
        index, found = links.member.index, []
        for i, (kind, rows) in enumerate(works):
            width = widths[0 if kind == "sum" else index]
            x = numbers(index, i, rows, width)
            found.append(links.sum_(x) if kind == "sum" else links.gather(x, widths))
        return found

    answers = at_once([lambda links=links: work_at(links) for links in ranks])  # type: ignore[misc]
    for i, (kind, rows) in enumerate(works):
        for index, found in enumerate(answers):
            if kind == "sum":
                parts = [numbers(member, i, rows, widths[0]) for member in range(tp)]
                assert torch.equal(found[i], sum(parts[1:], parts[0])), "in the order of the ranks"
            else:
                parts = [numbers(member, i, rows, widths[member]) for member in range(tp)]
                whole = torch.cat(parts, 1)
                assert torch.equal(found[i], whole if index == 0 else whole[:0])


@needs_library
@given(sizes=st.lists(st.integers(1, 60), max_size=12), box=st.sampled_from([8, 64]))
def test_activations_arrive_in_order(sizes: list[int], box: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_links, "_BOX", box)
        ranks = meet(tmp_path_factory.mktemp("links"), 2, 3)
    sent = [torch.full((1, size), float(i)) for i, size in enumerate(sizes)]

    def pass_on(rank: int) -> list[Tensor]:
        links, found = ranks[rank], []
        for x in sent:
            received = x + 100 * rank if rank < 2 else links.receive((1, x.shape[1])) + 1
            found.append(received)
            if rank < 4:
                links.send(received)
        return found

    answers = at_once([lambda rank=rank: pass_on(rank) for rank in range(6)])  # type: ignore[misc]
    for rank in (4, 5):
        assert all(torch.equal(got, x + 100 * (rank % 2) + 2) for got, x in zip(answers[rank], sent, strict=True))


@needs_library
def test_a_sender_does_not_wait_for_whoever_computes(tmp_path: Path) -> None:
    """The next stage is busy; what it will need lies there meanwhile."""
    first, second = meet(tmp_path, 1, 2)
    sent = [torch.full((32, 576), float(i)) for i in range(4)]
    for x in sent:
        first.send(x)
    for x in sent:
        assert torch.equal(second.receive((32, 576)), x)


@needs_library
def test_the_kernels_own_call_of_all_blocks_sums_as_the_modules_do(tmp_path: Path) -> None:
    """In bf16, where our own kernels multiply, a stage is one call of C, which calls the links' C."""
    make_checkpoint(tmp_path, **WIDE)
    places = all_places(tmp_path, 3, 2)
    assert NATIVE is not None
    links = [HostLinks(NATIVE, place, tmp_path / "links") for place in places]
    with Ranks(tmp_path, zip(places, links, strict=True), torch.bfloat16) as ranks:
        got = ranks.logits(PROMPT)
    with Ranks.all(tmp_path, 3, 2, torch.bfloat16) as ranks:
        assert torch.equal(got, ranks.logits(PROMPT))


def test_a_sum_that_fails_in_the_midst_of_the_kernels_is_heard_of(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, **WIDE)
    places = all_places(tmp_path, 2, 1)

    class Broken(ThreadLinks):
        def sum_(self, x: Tensor) -> Tensor:
            if x.shape == (len(PROMPT), 96):  # of embeddings
                return x
            raise ConnectionError("the other rank is gone")

    meeting, queue = Meeting(2), SimpleQueue[Tensor]()
    rank = (places[0], Broken(places[0], meeting, queue, queue))
    with Ranks(tmp_path, [rank], torch.bfloat16) as ranks:
        if getattr(ranks.models[0], "stack", None) is None:
            pytest.skip("this processor has no bf16 vectors: modules are called one by one")
        with pytest.raises(ConnectionError, match="the other rank is gone"):
            ranks.logits(PROMPT)


def test_one_rank_is_linked_to_nobody(tmp_path: Path) -> None:
    assert connect(Place(Sharding(3, (30,))), CPU, tmp_path / "links") is ALONE
    assert not (tmp_path / "links").exists()


def test_ranks_that_meet_through_torch_distributed(tmp_path: Path) -> None:
    """Four processes, as where memory cannot be shared: two stages of two ranks compute what one device does."""
    make_checkpoint(tmp_path, vocab_size=127)
    command = [sys.executable, "-m", "tests.engine.gloo_rank", str(tmp_path), "2", "2"]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "meet")], stderr=subprocess.PIPE, text=True)
        for rank in range(4)
    ]
    errors = [process.communicate(timeout=PATIENCE)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, errors
    (place,) = all_places(tmp_path, 1, 1)
    with Ranks(tmp_path, [(place, ALONE)]) as ranks:
        expected = ranks.logits(PROMPT)
    torch.testing.assert_close(torch.load(tmp_path / "meet.logits"), expected, atol=1e-4, rtol=1e-4)
