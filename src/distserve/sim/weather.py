"""A machine that is not always as fast as it can be: by how much its steps are longer, as time goes. Knows no step."""

from __future__ import annotations

from distserve.costs import base
from distserve.sim.life import NEVER


class Weather:
    """Of one instance. `until`: when what `slows` said last will change."""

    __slots__ = ("_at", "_base", "_decodes", "_paces", "_prompts", "_span", "until")

    def __init__(self, watched: base.Weather, phase: float = 0.0) -> None:
        """`phase`: the second of what was watched at which the world begins."""
        self._paces = list(watched.paces)
        self._span: float = watched.span  # 0: the last pace holds for ever
        self._base = -phase  # when the first pace of this turn began
        self._at = -1
        self._prompts = self._decodes = 1.0
        self.until = self._base
        self.slows(0.0, True)

    def slows(self, now: float, prompts: bool) -> float:
        """How many times as long a step takes that begins now, with prompts or without. `now` never goes back."""
        paces = self._paces
        while self.until <= now:
            self._at += 1
            if self._at == len(paces):
                self._at = 0
                self._base += self._span
            pace = paces[self._at]
            self._prompts, self._decodes = pace.prompts, pace.decodes
            if self._at + 1 < len(paces):
                self.until = self._base + paces[self._at + 1].at
            else:
                self.until = self._base + self._span if self._span else NEVER
        return self._prompts if prompts else self._decodes
