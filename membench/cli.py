"""The command line. Imports what a command needs when it runs, so that --help is immediate."""

import atexit
import gc
import sys
from functools import partial
from typing import Annotated

import typer

from membench import __version__
from membench.commands.check import check
from membench.commands.compare import compare
from membench.commands.evaluate import evaluate
from membench.commands.explore import explore
from membench.commands.list import list_
from membench.commands.options import EachOptionOnce
from membench.commands.plan import plan
from membench.commands.report import report
from membench.commands.reproduce import reproduce
from membench.commands.study import study
from membench.config import border
from membench.paths import leave_out_current_folder
from membench.runs import launched

app = typer.Typer(
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Compare memory-efficient training methods: how much memory each needs, how fast it is, how well it learns.",
)

app.command(cls=EachOptionOnce)(check)
app.command(cls=EachOptionOnce)(compare)
app.command(cls=EachOptionOnce)(evaluate)
app.command(cls=EachOptionOnce)(explore)
app.command("list", cls=EachOptionOnce)(list_)
app.command(cls=EachOptionOnce)(plan)
app.command(cls=EachOptionOnce)(report)
app.command(cls=EachOptionOnce)(reproduce)
app.command(cls=EachOptionOnce)(study)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"membench {__version__}")
        raise typer.Exit()


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    show_traceback: Annotated[  # looked for by `main`, wherever it stands
        bool, typer.Option(border.TRACEBACK, help="Show where an error comes from; with every command.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The console script: a user's mistake is one line on stderr and exit code 2, in all processes of a launcher."""
    leave_out_current_folder()
    atexit.register(gc.freeze)  # what is left at the end isn't searched for garbage, which takes a second after imports
    arguments = sys.argv[1:]
    sys.argv[1:] = [argument for argument in arguments if argument != border.TRACEBACK]
    sys.exit(border.run(launched.group, []) or launched.together(partial(border.run, app, arguments)))
