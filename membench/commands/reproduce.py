"""`membench reproduce`: a published table made again, and ours beside the paper's."""

from typing import Annotated, Any

import typer

from membench.commands.options import takes
from membench.config import launcher
from membench.config.declare import hold_to_bounds, typed
from membench.config.errors import UserError
from membench.config.options import ReproduceOptions


@takes(ReproduceOptions)
def reproduce(
    name: Annotated[
        str,
        typer.Argument(help="badam-table-2, badam-table-11, galore-table-2, galore-table-11 or lomo-table-1."),
    ],
    **given: Any,
) -> None:
    """Make a paper's table again, with its settings: say what that needs, run it, print ours beside the paper's.

    Makes only the runs missing in --out: the same command again continues where it stopped.
    """
    options = ReproduceOptions(**typed(ReproduceOptions, given))
    hold_to_bounds(options)
    if launcher.place():
        raise UserError("reproduce makes its runs in one process each, as published: start it without a launcher")
    from membench.reproduce.carry_out import reproduce as make

    raise typer.Exit(make(name, options))
