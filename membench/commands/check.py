"""`membench check`: is a candidate worse than its baseline?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from membench.config.errors import UserError
from reports.names import suggestion

if TYPE_CHECKING:
    from reports.record import Found


def _print_thresholds(wanted: bool) -> None:
    if wanted:
        from reports.regressions import thresholds

        print(thresholds.default_text(), end="")
        raise typer.Exit()


def check(
    baseline: Annotated[Path, typer.Argument(help="Folder or file of records to compare with.")],
    candidate: Annotated[Path, typer.Argument(help="Folder or file of records to judge.")],
    format: Annotated[str, typer.Option("--format", help="terminal, markdown, junit or json.")] = "terminal",
    thresholds: Annotated[
        Path | None, typer.Option("--thresholds", help="TOML file of tolerances.", show_default=False)
    ] = None,
    only: Annotated[
        str | None,
        typer.Option("--only", help="Some of memory,saving,quality,throughput; all by default.", show_default=False),
    ] = None,
    update: Annotated[
        bool, typer.Option("--update", help="Accept the candidate as the new baseline, whatever the verdict.")
    ] = False,
    print_thresholds: Annotated[
        bool,
        typer.Option(
            "--print-thresholds",
            callback=_print_thresholds,
            is_eager=True,
            help="Print the default thresholds, to edit.",
        ),
    ] = False,
) -> None:
    """Say whether a candidate needs more memory, learns worse or is slower than its baseline.

    Rows are paired by task, method, model and seed. Exit code: 0 fine, 1 a regression, 2 a mistake in the command, 3
    not comparable, 4 a run failed; if several apply, the first in the order 2, 3, 4, 1.
    """
    try:
        code = _check(baseline, candidate, format, thresholds, only, update)
    except ValueError as error:
        raise UserError(str(error)) from error
    raise typer.Exit(code)


def _check(
    baseline: Path, candidate: Path, format: str, thresholds: Path | None, only: str | None, update: bool
) -> int:
    from membench.runs.run_folder import Folder
    from reports.record import Found
    from reports.regressions import render
    from reports.regressions import thresholds as limits
    from reports.regressions.check import ALWAYS, METRICS
    from reports.regressions.check import check as judge

    if format not in render.FORMATS:
        raise UserError(f"--format {format}: there is no such format. {suggestion(format, render.FORMATS)}")
    metrics = _metrics(only, [name for name in METRICS if name != ALWAYS])
    tolerated = limits.load(thresholds)
    for place in (baseline, candidate) if update else ():
        Folder(place).check_idle()
    first = update and not baseline.exists()
    before, after = Found([], []) if first else _read(baseline), _read(candidate)
    result = judge(before, after, tolerated, metrics)
    if not first:
        print(render.render(result, format, (str(baseline), str(candidate))))
    return _accept(after, baseline) if update else result.code


def _metrics(only: str | None, known: list[str]) -> list[str]:
    names = known if only is None else [name.strip() for name in only.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UserError(f"--only {name}: there is no such check. {suggestion(name, known)}")
    if not names:
        raise UserError("--only is empty: give at least one")
    return names


def _read(place: Path) -> Found:
    from reports import record

    found = record.read(place)
    if not found.records and not found.problems:
        raise UserError(f"{place}: there are no records")
    return found


def _accept(candidate: Found, baseline: Path) -> int:
    """Replace the baseline, unless the candidate is incomplete."""
    from membench.commands.baseline import replace

    failed = [run["run_id"] for run in candidate.records if run["status"] == "failed"]
    if candidate.problems or failed:
        reasons = [*candidate.problems, *(f"{run_id} failed." for run_id in failed)]
        print(f"{baseline}: not updated. {' '.join(reasons)}", file=sys.stderr)
        return 3 if candidate.problems else 4
    replace(baseline, candidate.records)
    print(f"{baseline}: updated, {len(candidate.records)} runs", file=sys.stderr)
    return 0
