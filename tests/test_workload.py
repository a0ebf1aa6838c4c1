import itertools
import json
from collections import Counter
from pathlib import Path
from statistics import fmean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve import traces
from distserve.errors import WorkloadError
from distserve.traces import Arrival
from distserve.workload import BUILT_IN, Workload

lengths = st.integers(1, 100_000)
times = st.floats(0, 1e6, allow_nan=False)
apps = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8).map(str.strip)


@st.composite
def timed(draw: st.DrawFn) -> Workload:
    when = sorted(draw(st.lists(times, min_size=1, max_size=20)))
    return Workload("drawn", tuple(Arrival(t, draw(lengths), draw(lengths), draw(apps)) for t in when), timed=True)


@given(timed())
def test_written_and_read_again_nothing_changes(workload: Workload) -> None:
    again = traces.parse(workload.to_csv(), "f")
    assert again.arrivals == workload.arrivals
    assert again.timed


@given(timed())
def test_as_jsonl_too(workload: Workload) -> None:
    rows = [
        {"arrival": r.arrival, "prompt_tokens": r.prompt_tokens, "output_tokens": r.output_tokens, "app": r.app}
        for r in workload
    ]
    assert traces.parse("\n".join(map(json.dumps, rows)), "f").arrivals == workload.arrivals


@pytest.mark.parametrize(
    ("name", "number", "prompt", "output"),
    [("sharegpt", 12088, 755, 200), ("humaneval", 164, 171, 98), ("longbench", 2000, 1738, 91)],
)
def test_built_in_names_have_the_papers_means(name: str, number: int, prompt: float, output: float) -> None:
    workload = Workload.load(name)
    assert (workload.name, len(workload), workload.timed) == (name, number, False)
    assert workload.mean_prompt_tokens == pytest.approx(prompt, rel=0.06)
    assert workload.mean_output_tokens == pytest.approx(output, rel=0.06)
    assert workload.offered_rate is None


@pytest.mark.parametrize(
    ("name", "words"),
    [("sharegtp", "did you mean sharegpt"), ("xyz", "sharegpt, humaneval, longbench"), ("xyz.csv", "No such file")],
)
def test_an_unknown_name_is_refused(name: str, words: str) -> None:
    with pytest.raises(WorkloadError, match=words):
        Workload.load(name)


def test_a_file_is_replayed_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "w.csv"
    path.write_text("arrival,prompt_tokens,output_tokens\n3,1,2\n4,3,4\n6,5,6\n")
    workload = Workload.load(path)
    assert workload.arrivals == (Arrival(3, 1, 2), Arrival(4, 3, 4), Arrival(6, 5, 6))
    assert workload.span == 3
    assert workload.offered_rate == pytest.approx(2 / 3)
    assert workload.head(2).arrivals == workload.arrivals[:2]
    assert len(workload.head(10)) == 3


@pytest.mark.parametrize("cv", [0.0, 0.3, 1.0, 3.0])
def test_gaps_have_the_mean_and_the_spread_that_were_asked_for(cv: float) -> None:
    drawn = Workload.load("humaneval").draw(8.0, 20_000, seed=3, cv=cv)
    at = [request.arrival for request in drawn]
    gaps = [b - a for a, b in itertools.pairwise(at)]
    assert at[0] == 0
    assert fmean(gaps) == pytest.approx(1 / 8, rel=0.08 if cv > 1 else 0.03)
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(cv, rel=0.08, abs=1e-9)
    assert (drawn.timed, drawn.rate, drawn.offered_rate) == (True, 8.0, 8.0)


def test_draws_repeat_and_rates_share_their_luck() -> None:
    source = Workload.load("sharegpt")
    slow, fast = source.draw(1.0, 500, seed=7), source.draw(4.0, 500, seed=7)
    assert slow == source.draw(1.0, 500, seed=7)
    assert slow.arrivals != source.draw(1.0, 500, seed=8).arrivals
    assert [r.prompt_tokens for r in slow] == [r.prompt_tokens for r in fast]
    assert [r.arrival for r in slow] == pytest.approx([4 * r.arrival for r in fast])
    assert source.draw(1.0, 50, seed=7).arrivals == slow.arrivals[:50]


def test_every_row_comes_once_before_any_comes_again() -> None:
    source = Workload.load("humaneval")
    drawn = source.draw(1.0, 2 * 164, seed=1)

    def pairs(arrivals: tuple[Arrival, ...]) -> Counter[tuple[int, int]]:
        return Counter((r.prompt_tokens, r.output_tokens) for r in arrivals)

    assert pairs(drawn.arrivals[:164]) == pairs(drawn.arrivals[164:]) == pairs(source.arrivals)


@given(timed(), st.integers(2, 5000))
def test_clipped_requests_fit_and_others_stay(workload: Workload, context: int) -> None:
    clipped = workload.clipped(context)
    changed = 0
    for before, after in zip(workload, clipped, strict=True):
        assert after.prompt_tokens + after.output_tokens <= context
        assert (after.arrival, after.app) == (before.arrival, before.app)
        fits = before.prompt_tokens + before.output_tokens <= context
        assert (before == after) == fits
        changed += not fits
    assert any(f"{changed} of" in note for note in clipped.notes) == bool(changed)


def test_scaled() -> None:
    workload = Workload("w", (Arrival(0, 100, 10), Arrival(1, 1, 1)), timed=True).scaled(0.25, 0.5)
    assert [(r.prompt_tokens, r.output_tokens) for r in workload] == [(25, 5), (1, 1)]


def test_wrong_values_are_refused() -> None:
    workload = Workload("w", (Arrival(0, 1, 1),), timed=True)
    nan = float("nan")
    for call in (
        lambda: workload.draw(0, 1), lambda: workload.draw(nan, 1), lambda: workload.draw(1, 0),
        lambda: workload.draw(1, 1, cv=-1), lambda: workload.draw(1, 1, cv=nan), lambda: workload.draw(1, 1, cv=1e-200),
        lambda: workload.scaled(0, 1), lambda: workload.clipped(1), lambda: workload.head(0),
        lambda: Workload("w", (), timed=False), lambda: Workload("w", (Arrival(2, 1, 1), Arrival(1, 1, 1)), timed=True),
        lambda: Arrival(nan, 1, 1), lambda: Arrival(-1, 1, 1), lambda: Arrival(0, 0, 1), lambda: Arrival(0, 1, 0),
    ):  # fmt: skip
        with pytest.raises(WorkloadError):
            call()


def test_built_in_names_are_the_files_that_ship() -> None:
    import distserve

    folder = Path(distserve.__path__[0]) / "data"
    tables = {"devices"}  # no workload
    assert {path.stem for path in folder.glob("*.csv")} - tables == set(BUILT_IN)
