"""From tokens to text while they arrive: whole characters only, cut exactly at stop strings; knows no model, no HTTP.

    token -> bytes of its piece -> whole UTF-8 characters -> text that cannot begin a stop string any more
                 (table)          (an incomplete one waits)  (a suffix that could, waits)

What comes out piece by piece is, joined, what would come out if everything were decoded and searched at once.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence

from distserve.request import FinishReason, Token


class Utf8:
    """Bytes in any portions to whole characters. What is no UTF-8 becomes U+FFFD; what may still become a character
    waits. O(1) per portion: at most three bytes wait."""

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting = b""

    def decode(self, data: bytes, final: bool = False) -> str:
        data = self._waiting + data if self._waiting else data
        text, used = utf_8_decode(data, "replace", final)
        self._waiting = data[used:]
        return text


class StopStrings:
    """The stop strings of a request as one automaton (Aho & Corasick, 1975): a dictionary look-up per character,
    however many there are. Immutable; the choices of a request share it.

    State `s` stands for the longest suffix of the text that begins a stop string; state 0 for none.
    """

    __slots__ = ("depth", "fail", "goto", "longest")

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "the API refuses empty stop strings"
        self.goto: list[dict[str, int]] = [{}]
        self.depth = [0]  # characters of the suffix a state stands for
        self.longest = [0]  # of those, how many belong to the longest stop string that ends here (0: none does)
        self.fail = [0]  # the state of the next shorter suffix
        for stop in stops:
            state = 0
            for character in stop:
                if character not in self.goto[state]:
                    self.goto[state][character] = len(self.goto)
                    self.goto.append({})
                    self.depth.append(self.depth[state] + 1)
                    self.longest.append(0)
                    self.fail.append(0)
                state = self.goto[state][character]
            self.longest[state] = self.depth[state]
        self._link()

    def _link(self) -> None:
        """Fills `fail` and carries `longest` along it, breadth first: shorter suffixes are ready before longer ones."""
        level = list(self.goto[0].values())
        while level:
            below: list[int] = []
            for state in level:
                for character, child in self.goto[state].items():
                    self.fail[child] = self.step(self.fail[state], character)
                    self.longest[child] = self.longest[child] or self.longest[self.fail[child]]
                    below.append(child)
            level = below

    def step(self, state: int, character: str) -> int:
        while (following := self.goto[state].get(character)) is None:
            if not state:
                return 0
            state = self.fail[state]
        return following


class StopSearch:
    """One text's search for stop strings. Of several, the one that ends first counts; of those that end together, the
    longest: so the answer does not depend on how the text was portioned."""

    __slots__ = ("_include", "_state", "_stops", "_waiting", "found")

    def __init__(self, stops: StopStrings, include: bool) -> None:
        self._stops = stops
        self._include = include  # the stop string itself stays in the text
        self._state = 0
        self._waiting = ""  # the suffix that `_state` stands for
        self.found: str | None = None

    def feed(self, text: str) -> str:
        """What of the text so far is certain and was not returned before. Not to be called after `found` is set."""
        stops, state = self._stops, self._state
        buffer = self._waiting + text
        for end, character in enumerate(text, len(self._waiting) + 1):
            state = stops.step(state, character)
            if length := stops.longest[state]:
                self.found = buffer[end - length : end]
                self._waiting = ""
                return buffer[: end if self._include else end - length]
        self._state = state
        certain = len(buffer) - stops.depth[state]
        self._waiting = buffer[certain:]
        return buffer[:certain]

    def flush(self) -> str:
        """The text ends here: what was waiting begins no stop string after all."""
        waiting, self._waiting = self._waiting, ""
        return waiting


class TextStream:
    """The text of one choice. Feed tokens until `finish` is set; tokens after a stop string are not counted."""

    __slots__ = ("_include_stop", "_min_tokens", "_pieces", "_search", "_utf8", "finish", "num_tokens", "stop")

    def __init__(
        self,
        pieces: Sequence[bytes],
        stops: StopStrings | None = None,
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        """`pieces[id]`: the bytes that token adds to the text. Stop strings count after `min_tokens` tokens."""
        self._pieces = pieces
        self._utf8 = Utf8()
        self._search = StopSearch(stops, include_stop) if stops is not None else None
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self.num_tokens = 0  # generated tokens up to the end of the answer
        self.finish: FinishReason | None = None
        self.stop: str | int | None = None  # the stop string, or the id of the token, that ended it

    def feed(self, tokens: Sequence[Token]) -> str:
        """The text that became certain with these tokens; may be empty."""
        if len(tokens) == 1:  # nearly always
            return self._feed(tokens[0])
        text = ""
        for token in tokens:
            text += self._feed(token)
            if self.finish is not None:
                break
        return text

    def _feed(self, token: Token) -> str:
        self.num_tokens += 1
        finish = token.finish
        if finish is None and self._search is None:  # nearly always
            return self._utf8.decode(self._pieces[token.id] if token.id < len(self._pieces) else b"")
        if finish is FinishReason.STOP:
            self.stop = token.id
        if finish is FinishReason.STOP and not self._include_stop:
            piece = b""  # the token that stops is no part of the answer
        else:
            piece = self._pieces[token.id] if token.id < len(self._pieces) else b""
        text = self._utf8.decode(piece, finish is not None)
        if self._search is not None and self.num_tokens > self._min_tokens:
            text = self._search.feed(text)
            if self._search.found is not None:
                self.stop = self._search.found
                self.finish = FinishReason.STOP
                return text
        if finish is not None:
            self.finish = finish
            if self._search is not None:
                text += self._search.flush()
        return text
