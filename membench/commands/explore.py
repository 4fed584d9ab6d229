"""`membench explore`: one page with the plans of many methods on many models, to choose in."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from membench.commands.options import takes
from membench.config.assignments import unused_hyperparameters
from membench.config.declare import hold_to_bounds, like, option, typed
from membench.config.errors import UserError, about_file
from membench.config.options import RunOptions, writable_folder

if TYPE_CHECKING:
    from membench.planning.table import Setting

SMALL = 1_000_000_000  # weights: such models are trained in float32, too, and rarely need checkpointing
LARGE = 10_000_000_000  # and such always do


@dataclass(frozen=True)
class ExploreOptions:
    """The options of `membench explore`."""

    models: tuple[str, ...] = option(
        ("all",), "Built-in configurations (all of them by default), config.json files, folders, hub ids."
    )
    optimizers: tuple[str, ...] = like(
        RunOptions, "optimizers", default=("all",), help="all (the default), or badam,lora,package.module:Class."
    )
    dtypes: tuple[Literal["bfloat16", "float32", "float16"], ...] | None = option(
        None, "Of the weights: by default bfloat16, and float32 for models below a billion weights."
    )
    hyperparameters: dict[str, dict[str, Any]] = like(RunOptions, "hyperparameters")
    out: str = option("fit.html", "The page to write; ./{default} by default.")


@takes(ExploreOptions)
def explore(**given: Any) -> None:
    """Plan methods on models at every batch and sequence, and write a page to choose in: what fits on which card.

    One file, which needs no network. Planning all methods with one dtype and with or without checkpointing takes a core
    half a minute a model.
    """
    options = ExploreOptions(**typed(ExploreOptions, given))
    hold_to_bounds(options)
    print(write(options))


def write(options: ExploreOptions) -> Path:
    """Make the page, and say where it is.

    Raises:
        UserError: a value is wrong, nothing can be planned, or the page can't be written; it says where it is then.
    """
    import optimizers
    from membench.commands.progress import counting
    from membench.planning.explore import explore as make
    from reports import files

    try:
        from reports.page import fit
    except ModuleNotFoundError as error:
        if error.name not in ("matplotlib", "jinja2"):
            raise
        raise UserError(f"The page needs {error.name}: pip install 'membench[page]'.") from error
    out = Path(options.out)
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: give the page's name, such as {out / 'fit.html'}")
    writable_folder("--out", str(out.parent))
    methods = optimizers.expand(options.optimizers)
    try:
        wanted = _settings(options.models, options.dtypes)
        with counting(len(wanted), "tables") as tell:
            document = make(wanted, methods, options.hyperparameters, report=tell)
        _check_rows(document["settings"])
        for sentence in unused_hyperparameters(options.hyperparameters, methods):
            typer.echo(sentence, err=True)
        page = fit.render(document).encode()
    except ValueError as error:
        raise UserError(str(error)) from error
    try:
        return files.write(out, page)
    except OSError as error:
        raise UserError(f"--out {about_file(error)}; {_kept_elsewhere(page, out)}") from error


def _kept_elsewhere(page: bytes, out: Path) -> str:
    """Keep a page of hours although its folder takes none."""
    from reports import files

    try:
        kept = files.write(Path(tempfile.mkdtemp(prefix="membench-")) / out.name, page)
    except OSError as error:
        return f"the page is lost, since there is no room for it elsewhere either: {about_file(error)}"
    return f"the page is kept in {kept}"


def _check_rows(tables: Sequence[dict[str, Any]]) -> None:
    """Raises ValueError if every method is refused in every table: there is nothing to choose from."""
    refused = [why for table in tables for why in table["refused"].values()]
    if refused and not any(table["rows"] for table in tables):
        raise ValueError(refused[0])


def _settings(models: Sequence[str], dtypes: Sequence[str] | None) -> list[Setting]:
    """The tables that people need."""
    from membench.planning.blueprint import Blueprint
    from membench.planning.table import Setting
    from membench.planning.workload import Workload
    from tasks.models.source import CONFIGURATIONS

    found = []
    for model in CONFIGURATIONS if tuple(models) == ("all",) else dict.fromkeys(models):
        size = Blueprint(Workload(model, sequence_length=1)).parameters
        checkpointing = [*([True] if size >= SMALL else []), *([False] if size < LARGE else [])]
        for dtype in dtypes or ("bfloat16", *(["float32"] if size < SMALL else [])):
            found += [Setting(model, dtype, each) for each in checkpointing]
    return found
