"""`membench report`: tables, a page or plots of a folder of records."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import UserError


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
        Path | None, typer.Option("--out", help="File to write to instead of printing; of plots, the folder.")
    ] = None,
) -> None:
    """Print the tables of a folder of records again, or make a page or plots of them.

    A file that is no record is named on stderr, and the exit code is 1; the others are reported.
    """
    from reports import record

    if format is Format.plots and out is None:
        raise UserError("--format plots writes files: say where with --out FOLDER.")
    try:
        found = record.read(folder)
        for problem in found.problems:
            print(problem, file=sys.stderr)
        _write(found, format, out)
    except ValueError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"{error.filename or out}: can't be written: {error.strerror}.") from error
    raise typer.Exit(1 if found.problems else 0)


def _write(found: Any, format: Format, out: Path | None) -> None:
    from reports import files

    if format is Format.plots:
        print(f"{len(_drawing('figures').write(found.records, out))} files in {out}")
        return
    text = _text(found, format)
    if out is None:
        print(text)
    else:
        files.write(out, (text + "\n").encode())
        print(out)


def _text(found: Any, format: Format) -> str:
    if format is Format.html:
        return _drawing("page").render(found.records, found.problems)
    from reports import tables

    return tables.render(found.records, format.value)


def _drawing(name: str) -> Any:
    """A module of reports that draws, for which one has to have installed more."""
    from importlib import import_module

    try:
        return import_module(f"reports.{name}")
    except ModuleNotFoundError as error:
        if error.name not in ("matplotlib", "jinja2"):
            raise
        raise UserError(f"Pages and plots need {error.name}: pip install 'membench[page]'.") from error
