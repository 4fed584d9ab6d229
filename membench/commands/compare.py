"""`membench compare`: the runs of a comparison that are missing, and the tables of all of them."""

from typing import Annotated, Any

import typer

from membench.commands.options import takes
from membench.config.declare import typed
from membench.config.settings import Settings


@takes(Settings)
def compare(
    config: Annotated[
        str | None,
        typer.Option(help="TOML file: these options as keys, and a table for each method.", show_default=False),
    ] = None,
    **given: Any,
) -> None:
    """Train the same model on the same data with each method, measure it, print the tables.

    Makes only the runs missing in --out: the same command again continues where it stopped. Values come from the
    command line, else from --config, else from the profile, else from the defaults.
    """
    from membench.config.settings import resolve
    from membench.runs.compare import compare as make

    raise typer.Exit(make(resolve(given, config), typed(Settings, given).get("hyperparameters")))
