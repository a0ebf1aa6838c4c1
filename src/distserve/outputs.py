"""Files that a command was asked to write: refused before any work where they cannot be written, "-" is stdout."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from distserve.errors import UsageError


def check_writable(option: str, path: str | Path | None) -> None:
    """Raises `UsageError` where `path` could not be written after the work."""
    if path is None or str(path) == "-":
        return
    folder = Path(path).parent
    target = Path(path) if Path(path).exists() else folder
    if not folder.is_dir() or Path(path).is_dir() or not os.access(target, os.W_OK):
        raise UsageError(f"{option} {path}: cannot be written: name a file in a folder that is yours to write")


def write_text(path: str | Path, text: str) -> None:
    """Raises `UsageError` where the disk says no."""
    if str(path) == "-":
        sys.stdout.write(text)
        return
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {error.filename}: {error.strerror}") from None


def write_json(path: str | Path, value: Any) -> None:
    """One object; plain values, no NaN."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
