"""A machine whose pace changes: steps that begin in a slow spell take longer, and no others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve.costs import base
from distserve.costs.base import Pace
from distserve.sim.life import NEVER
from distserve.sim.weather import Weather

PACES = (Pace(0.0, 1.0, 1.0), Pace(2.0, 3.0, 1.5), Pace(5.0, 1.2, 1.0))


def test_each_pace_holds_until_the_next() -> None:
    weather = Weather(base.Weather(PACES))
    seen = []
    for now in (0.0, 1.9, 2.0, 4.0, 5.0, 1e6):
        seen.append((weather.slows(now, True), weather.slows(now, False), weather.until))
    assert seen == [(1, 1, 2)] * 2 + [(3, 1.5, 5)] * 2 + [(1.2, 1, NEVER)] * 2


@given(st.floats(0, 9.99), st.lists(st.floats(0, 30), max_size=20))
def test_what_was_watched_comes_again(phase: float, later: list[float]) -> None:
    weather = Weather(base.Weather(PACES, 10.0), phase)
    for now in sorted(later):
        seen = weather.slows(now, True), weather.slows(now, False)
        at = (now + phase) % 10
        expected = max((pace for pace in PACES if pace.at <= at), key=lambda pace: pace.at)
        if min(abs(at - edge) for edge in (0, 2, 5, 10)) > 1e-6:
            assert seen == expected[1:]
            assert weather.until == pytest.approx(now + min(edge - at for edge in (2, 5, 10) if edge > at))
