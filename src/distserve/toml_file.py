"""TOML files that people write: read, parsed and checked for unknown keys, each error one line with the cure. Knows no
key of its own."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from distserve.errors import PlanError


def read_text(path: str | Path, what: str) -> str:
    """The text of a `what`, such as "plan". Raises `PlanError`."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise PlanError(f"cannot read the {what} {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise PlanError(f"the {what} {path} is not a text file (UTF-8)") from None


def parse(text: str, source: str) -> dict[str, Any]:
    """`source` opens the error. Raises `PlanError`."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PlanError(f"{source}: not TOML: {error}") from None


def check_keys(table: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raises `PlanError` on a key that is not `known`, naming the nearest that is."""
    known = list(known)
    for key in table:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            raise PlanError(
                f"unknown key {key!r}: " + (f"did you mean {close[0]!r}?" if close else f"use {', '.join(known)}")
            )
