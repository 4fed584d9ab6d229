"""`membench report`: tables, a page or plots from a folder of records."""

import math
import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from membench.config.errors import UserError


class Format(StrEnum):
    """What `membench report` writes."""

    plain = "plain"
    markdown = "markdown"
    csv = "csv"
    json = "json"
    latex = "latex"
    html = "html"
    plots = "plots"


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of records.")],
    format: Annotated[
        Format, typer.Option("--format", help="Tables as text; html: a page; plots: SVG and PNG files.")
    ] = Format.plain,
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write instead of printing; for plots, a folder.")
    ] = None,
    at_memory: Annotated[
        str | None,
        typer.Option("--at-memory", metavar="SIZE", help="Rank methods by quality within this memory, such as 8GiB."),
    ] = None,
    table: Annotated[
        list[str] | None,
        typer.Option("--table", help="Only summary, memory, throughput or quality; csv: instead of a row a run."),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option("--push", metavar="hub:USER/NAME", help="Upload records and page to this dataset repository."),
    ] = None,
    to_target: Annotated[
        str | None, typer.Option("--to-target", metavar="METRIC=VALUE", help="Rank methods by the time to reach this.")
    ] = None,
) -> None:
    """Print the tables for a folder of records again, with what a study concludes; make a page or plots; rank methods.

    csv is one tidy table, a row a run, for pandas; with --table it is the printed ones.

    If a file isn't a record, it is named on stderr and the exit code is 1; the others are reported.
    """
    from reports import record

    if format is Format.plots and out is None:
        raise UserError("--format plots writes files: say where with --out FOLDER.")
    ranking = _ranking(format, at_memory, to_target)
    if push is not None and (ranking or table or out or format is not Format.plain):
        raise UserError("--push uploads the records, the page and all tables: leave out the other options")
    if table and ranking:
        raise UserError(
            "--table chooses among a report's tables, and --at-memory and --to-target make others: leave it out"
        )
    if table and format in (Format.html, Format.plots):
        raise UserError("--table chooses among the tables of plain, markdown, csv, json or latex: leave it out")
    try:
        found, tuned = record.read(folder), record.read_trials(folder)
        found.problems.extend(tuned.problems)
        for problem in found.problems:
            print(problem, file=sys.stderr)
        if push is not None:
            print(_drawing("push", "membench.runs").push(push, found, tuned.records))
        elif ranking:
            _put(ranking(found.records), out)
        elif format is Format.plots:
            print(f"{len(_drawing('figures').write(found.records, out))} files in {out}")
        else:
            _put(_text(found, tuned.records, format, table or ()), out)
    except ValueError as error:
        raise UserError(str(error)) from error
    raise typer.Exit(1 if found.problems else 0)


def _ranking(format: Format, at_memory: str | None, to_target: str | None) -> Callable[[Any], str] | None:
    """The function that makes the text of --at-memory or --to-target from records, if one was given."""
    if at_memory is None and to_target is None:
        return None
    if at_memory is not None and to_target is not None:
        raise UserError("give either --at-memory or --to-target, not both")
    if format in (Format.html, Format.plots):
        raise UserError(f"--format {format.value} has no rankings: use plain, markdown, csv, json or latex")
    if at_memory is not None:
        size = _size(at_memory)
        from reports import at_memory as within

        return lambda records: within.at_memory(records, size, format.value)
    from reports import to_target as race

    metric, target = _target(to_target or "")
    return lambda records: race.to_target(records, metric, target, format.value)


def _size(text: str) -> int:
    from membench.config.units import parse_memory

    try:
        return parse_memory(text)
    except ValueError as error:
        raise UserError(f"--at-memory {error}") from error


def _target(text: str) -> tuple[str, float]:
    metric, _, value = text.partition("=")
    try:
        target = float(value)
    except ValueError:
        target = math.nan
    if not metric.strip() or not math.isfinite(target):
        raise UserError(f"--to-target {text}: write METRIC=VALUE, such as accuracy=0.80")
    return metric.strip(), target


def _put(text: str, out: Path | None) -> None:
    from reports import files

    if out is None:
        print(text)
    else:
        files.write(out, (text + "\n").encode())
        print(out)


def _text(found: Any, trials: list[Any], format: Format, chosen: Sequence[str]) -> str:
    if format is Format.html:
        return _drawing("page").render(found.records, found.problems, trials)
    from reports import tables

    return tables.render(found.records, format.value, chosen, trials)


def _drawing(name: str, package: str = "reports") -> Any:
    """A module that draws, and needs optional packages."""
    from importlib import import_module

    try:
        return import_module(f"{package}.{name}")
    except ModuleNotFoundError as error:
        if error.name not in ("matplotlib", "jinja2"):
            raise
        raise UserError(f"Pages and plots need {error.name}: pip install 'membench[page]'.") from error
