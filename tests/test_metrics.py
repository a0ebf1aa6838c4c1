import csv
import io
import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve import metrics
from distserve.errors import UsageError
from distserve.metrics import SLO, Record, Summary, report

seconds = st.floats(0.0, 100.0)


@st.composite
def records(draw: st.DrawFn) -> Record:
    status = draw(st.sampled_from(["ok", "ok", "refused", "timeout"]))
    tokens = draw(st.integers(1, 50))
    ttft = draw(seconds) if status == "ok" else draw(st.none() | seconds)
    tpot = draw(seconds) if status == "ok" and tokens > 1 else None
    app = draw(st.sampled_from(["", "chat", "code"]))
    return Record(draw(st.floats(0, 50)), draw(st.integers(1, 50)), tokens, ttft, tpot, status, app)


slos = st.builds(SLO, st.none() | st.floats(0.1, 50), st.none() | st.floats(0.1, 50))


@given(st.lists(records(), min_size=1, max_size=60), slos, st.floats(0, 5))
def test_a_report_says_what_the_definitions_say(offered: list[Record], slo: SLO, warmup: float) -> None:
    start = min(r.arrival for r in offered)
    counted = [r for r in offered if r.arrival - start >= warmup]
    if not counted:
        with pytest.raises(UsageError, match="warm"):
            report(offered, slo, end=200.0, warmup=warmup)
        return
    found = report(offered, slo, end=200.0, warmup=warmup, devices=4, rate=2.0, seed=1)
    n = len(counted)
    ttft_met = [r.status == "ok" and (slo.ttft is None or (r.ttft or 0) <= slo.ttft) for r in counted]
    tpot_met = [r.status == "ok" and (slo.tpot is None or r.tpot is None or r.tpot <= slo.tpot) for r in counted]
    assert found.attainment.ttft == sum(ttft_met) / n
    assert found.attainment.tpot == sum(tpot_met) / n
    assert found.attainment.joint == sum(a and b for a, b in zip(ttft_met, tpot_met, strict=True)) / n
    assert (found.requests, found.counted) == (len(offered), n)
    assert found.completed + sum(found.failed.values()) == n
    good = [r.ttft for r in counted if r.status == "ok" and r.ttft is not None]
    if good:
        expected = [np.mean(good), *np.quantile(good, [0.5, 0.9, 0.99])]
        assert [found.ttft.mean, found.ttft.p50, found.ttft.p90, found.ttft.p99] == pytest.approx(expected)
    else:
        assert found.ttft == Summary()
    assert found.rate_per_device == 0.5
    for name in ("joint", "ttft", "tpot"):
        low, high = getattr(found.interval, name)
        assert 0 <= low <= getattr(found.attainment, name) <= high <= 1
    named = {r.app for r in counted} - {""}
    assert set(found.by_app) == named
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert json.loads(text)["attainment"]["joint"] == found.attainment.joint


def test_rate_and_throughput_come_from_the_records() -> None:
    offered = [Record(10 + i, 100, 20, 0.1, 0.01) for i in range(5)] + [Record(15, 7, 7, status="refused")]
    found = report(offered, SLO(), end=20.0)
    assert found.rate == 1.0
    assert found.duration == 10.0
    assert found.throughput == {"requests": 0.5, "prompt_tokens": 50.0, "output_tokens": 10.0}
    assert found.rate_per_device is None
    assert report(offered[:1], SLO(), end=11).rate is None
    with pytest.raises(UsageError, match="no requests"):
        report([], SLO(), end=1)


def test_warm_up_counts_from_the_first_arrival() -> None:
    offered = [Record(100 + i, 1, 1, ttft=5.0 if i < 3 else 0.1) for i in range(10)]
    found = report(offered, SLO(ttft=1), end=120, warmup=3.0)
    assert (found.counted, found.attainment.joint) == (7, 1.0)


def test_tpot() -> None:
    assert metrics.tpot(1.0, 2.0, 11) == pytest.approx(0.1)
    assert metrics.tpot(1.0, 1.0, 1) is None
    assert SLO(tpot=0.001).met(Record(0, 1, 1, ttft=1.0))


@pytest.mark.parametrize(
    ("text", "slo"),
    [
        ("ttft=0.25,tpot=0.1", SLO(0.25, 0.1)), ("tpot=100ms, ttft=250ms", SLO(0.25, 0.1)), ("ttft=2", SLO(2.0)),
        ("TPOT = 0.05s", SLO(tpot=0.05)), ("ttft=5e-2", SLO(0.05)), ("ttft=.5", SLO(0.5)), ("ttft=500us", SLO(0.0005)),
    ],
)  # fmt: skip
def test_slo_parses(text: str, slo: SLO) -> None:
    parsed = SLO.parse(text)
    assert parsed.ttft == pytest.approx(slo.ttft)
    assert parsed.tpot == pytest.approx(slo.tpot)


@pytest.mark.parametrize(
    "text", ["", "0.25", "ttft", "ttft=", "ttft=-1", "ttft=nan", "ttft=0", "e2e=3", "ttft=1,ttft=2", "ttft=1h"]
)
def test_other_slos_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        SLO.parse(text)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.floats(0, 1))
def test_quantile_is_numpys(values: list[float], q: float) -> None:
    assert metrics.quantile(sorted(values), q) == pytest.approx(np.quantile(values, q), rel=1e-9, abs=1e-6)


def test_interval_covers_independent_requests() -> None:
    chance = random.Random(1)
    covered = 0
    for _ in range(300):
        low, high = metrics.proportion_interval([chance.random() < 0.9 for _ in range(400)])
        covered += low <= 0.9 <= high
    assert covered >= 0.92 * 300


def test_interval_is_honest_about_requests_that_fail_together() -> None:
    """Congestion comes in waves: 900 requests, of which stretches of 30 all miss. An interval for independent ones
    covers the truth in about a third of the runs."""
    chance = random.Random(2)
    covered = 0
    for _ in range(200):
        outcomes = [met for _ in range(30) for met in [chance.random() < 0.8] * 30]
        low, high = metrics.proportion_interval(outcomes)
        covered += low <= 0.8 <= high
    assert covered >= 0.85 * 200


def test_interval_of_few_or_equal_outcomes() -> None:
    low, high = metrics.proportion_interval([True] * 100)
    assert high == 1.0
    assert 0.95 < low < 0.98
    low, high = metrics.proportion_interval([False])
    assert low == 0.0
    assert high > 0.7


def test_requests_file() -> None:
    out = io.StringIO()
    metrics.write_requests([Record(0.1, 5, 2, 0.25, 0.125), Record(1 / 3, 5, 2, status="refused")], out)
    rows = list(csv.DictReader(io.StringIO(out.getvalue())))
    assert list(rows[0]) == ["arrival", "prompt_tokens", "output_tokens", "ttft", "tpot", "status"]
    assert rows[0] == {
        "arrival": "0.1",
        "prompt_tokens": "5",
        "output_tokens": "2",
        "ttft": "0.250000",
        "tpot": "0.125000",
        "status": "ok",
    }
    assert float(rows[1]["arrival"]) == 1 / 3
    assert (rows[1]["ttft"], rows[1]["status"]) == ("", "refused")
