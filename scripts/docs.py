"""Writes docs/reference/cli.md out of the command line itself, so that the two cannot differ. A test runs it too.

python scripts/docs.py          writes the file
python scripts/docs.py -        prints it
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import typer

from distserve.cli import app

TARGET = Path(__file__).parent.parent / "docs" / "reference" / "cli.md"
HEAD = """# The command line

Generated from the commands by `scripts/docs.py`; `distserve COMMAND --help` says the same.

What a command answers goes to stdout, what it has to say to stderr. Exit status: 0 done, 1 the answer is no (a goal
missed, a server that does not answer), 2 bad usage or input (one line, `distserve: error: ...`), 130 Ctrl-C.
"""


def page() -> str:
    group: Any = typer.main.get_command(app)
    return "\n".join([HEAD, *(section(name, command) for name, command in group.commands.items())])


def section(name: str, command: Any) -> str:
    lines = [f"## distserve {name}", "", *prose(inspect.cleandoc(command.help or "")), ""]
    lines += ["| | default | |", "|---|---|---|"]
    for parameter in command.params:
        if parameter.name != "help":
            lines.append(f"| {names(parameter)} | {default(parameter)} | {meaning(parameter)} |")
    return "\n".join(lines) + "\n"


def prose(text: str) -> list[str]:
    """The docstring; its blocks that must not be wrapped (typer wants them marked by \\b) become code."""
    lines: list[str] = []
    for block in text.split("\n\n"):
        if block.startswith("\b\n"):
            title, *rest = block[2:].split("\n")
            lines += [title, "", "```sh", *(line.strip() for line in rest), "```", ""]
        else:
            lines += [block, ""]
    return lines[:-1]


def names(parameter: Any) -> str:
    metavar = escaped(parameter.metavar or "")
    if parameter.param_type_name == "argument":
        return f"`{metavar}`"
    spelled = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
    return f"{spelled} `{metavar}`" if metavar else spelled


def default(parameter: Any) -> str:
    """What the help says in brackets, or the value itself."""
    told = (parameter.help or "").rpartition("[default: ")
    if told[1]:
        return escaped(told[2].rstrip("] "))
    value = parameter.default
    return "" if value is None or value is False else f"`{'yes' if value is True else value}`"


def meaning(parameter: Any) -> str:
    text = (parameter.help or "").partition("[default: ")[0].strip()
    if parameter.envvar:
        text += f" Environment: `{parameter.envvar}`."
    return escaped(" ".join(text.split()))


def escaped(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    if sys.argv[1:] == ["-"]:
        sys.stdout.write(page())
    else:
        TARGET.write_text(page(), encoding="utf-8")
