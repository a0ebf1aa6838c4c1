"""Tables and numbers as the document writes them. Knows no experiment."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

NONE = "–"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join(["---", *["---:"] * (len(head) - 1)]) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.1f}"


def number(value: float | None, digits: int = 3) -> str:
    """So many significant digits, no exponent."""
    if value is None:
        return NONE
    text = f"{value:.{digits}g}"
    return f"{float(text):.0f}" if "e" in text else text


def times(ratio: float | None) -> str:
    return NONE if ratio is None else f"{number(ratio)}x"


def listed(parts: Sequence[str]) -> str:
    """ "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
