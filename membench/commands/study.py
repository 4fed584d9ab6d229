"""`membench study`: a whole matrix of runs from one file."""

from typing import Annotated, Any

import typer

from membench.commands.options import takes
from membench.config.options import FanOutOptions


@takes(FanOutOptions)
def study(
    file: Annotated[str, typer.Argument(help="TOML file: options of compare, models, tune, memory (docs/study.md).")],
    shard: Annotated[
        str, typer.Option("--shard", metavar="PART/PARTS", help="Run only one part of the study, such as 2/8.")
    ] = "1/1",
    **given: Any,
) -> None:
    """Tune each method with the same number of trials, run all seeds, and recommend a method.

    Makes only what is missing: the same command again continues where it stopped.
    """
    from membench.config.study_file import load, parse_shard
    from membench.runs.study import study as carry_out

    raise typer.Exit(carry_out(load(file, given), parse_shard(shard)))
