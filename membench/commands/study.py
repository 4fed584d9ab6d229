"""`membench study`: a whole matrix of runs from one file."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def study(
    file: Annotated[str, typer.Argument(help="TOML file: options of compare, models, tune, memory; see the README.")],
    out: Annotated[str | None, typer.Option("--out", help="Folder of the records.", show_default=False)] = None,
    shard: Annotated[
        str, typer.Option("--shard", metavar="PART/PARTS", help="Make one of so many parts, such as 2/8.")
    ] = "1/1",
    threads: Annotated[int | None, typer.Option("--threads", help="CPU threads of a run.", show_default=False)] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="auto (the default), cpu, cuda, cuda:1.", show_default=False)
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Make runs again that diverged or ran out of memory.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar: one line a run.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the jobs, and run nothing.")] = False,
) -> None:
    """Tune each method on the same number of trials, run all seeds, and say which to use.

    Makes only what is missing: the same command again continues where it was stopped.
    """
    from membench.config.study_file import load, parse_shard
    from membench.runs.study import study as carry_out

    options: dict[str, Any] = {"out": out, "threads": threads, "device": device}
    given = {name: value for name, value in options.items() if value is not None}
    given |= {name: True for name, wanted in {"retry": retry, "quiet": quiet, "dry_run": dry_run}.items() if wanted}
    raise typer.Exit(carry_out(load(file, given), parse_shard(shard)))
