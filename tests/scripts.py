"""Programs that tests run in a process of their own, to choose whether its modules are compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from distserve import compiled


def script(code: str, *arguments: str, interpreted: bool = False, cwd: Path | None = None) -> str:
    """What it prints. Compiled modules run unless `interpreted`, where there are any."""
    environment = {key: value for key, value in os.environ.items() if key != compiled.OFF}
    if interpreted:
        environment[compiled.OFF] = "1"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=True).stdout
