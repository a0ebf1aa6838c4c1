"""The command line. Each room says in its command.py what its command asks for; what it does is imported when it runs.

stdout is data, stderr is talk. Exit status: 0 done, 1 the answer is no, 2 bad usage or input, 130 Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from distserve.bench.command import bench
from distserve.errors import DistserveError, UsageError
from distserve.planner.command import plan
from distserve.profiler.command import profile
from distserve.serve.command import serve
from distserve.sim.command import simulate
from distserve.validate.command import validate

app = typer.Typer(
    name="distserve",
    rich_markup_mode=None,  # plain help: clear without colour, and 0.2 s quicker
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.command()(serve)
app.command()(bench)
app.command()(simulate)
app.command()(plan)
app.command()(profile)
app.command()(validate)


@app.callback(invoke_without_command=True)
def distserve(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Serve a language model with prefill and decode apart, for goodput: the most requests per device that meet their
    latency targets.

    \b
    Start here:
      distserve serve                                  # a small real model on http://127.0.0.1:8000
      distserve bench --rate 1 --workload humaneval    # load it, and see what it attains
    """
    if version:
        from importlib.metadata import version as installed

        print(f"distserve {installed('distserve')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status. What a person can mend is said in one line, without a traceback."""
    try:
        status = app(args=argv, prog_name="distserve", standalone_mode=False)
    except typer.TyperException as error:  # an unknown command or option, a missing or malformed value
        format_message = getattr(error, "format_message", error.__str__)
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "distserve"
        return _refuse(format_message(), hint=f"{command} --help")
    except UsageError as error:
        return _refuse(str(error))
    except DistserveError as error:  # nothing that another command line would mend
        _refuse(str(error))
        return 1
    except typer.Abort:
        return 130
    except BrokenPipeError:  # the reader of stdout went away (`| head`): nothing is wrong here
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status if isinstance(status, int) else 0


def _refuse(message: str, hint: str = "") -> int:
    print(f"distserve: error: {' '.join(message.split())}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    return 2
