"""`membench list`: the methods, tasks, models and published tables to choose from."""

import textwrap
from enum import StrEnum
from typing import Annotated

import typer

from membench.config.errors import UserError


class Listing(StrEnum):
    """What `membench list` lists."""

    methods = "methods"
    tasks = "tasks"
    models = "models"
    reproductions = "reproductions"


def list_(
    what: Annotated[Listing, typer.Argument(help="What to list.")],
    name: Annotated[str | None, typer.Argument(help="A method, to list its hyper-parameters.")] = None,
) -> None:
    """List methods, tasks, models or the published tables that can be reproduced; of one method, what can be set."""
    listings = {"methods": methods, "tasks": task_names, "models": models, "reproductions": reproductions}
    if name is not None and what is not Listing.methods:
        raise UserError(f"list {what.value} takes no name: leave out {name!r}, or list methods {name}")
    try:
        print(method(name) if name else listings[what.value]())
    except ValueError as error:  # an installed package's task that can't be loaded
        raise UserError(str(error)) from error


def methods() -> str:
    """Every registered method: what it does, where it comes from, what it trains, keeps and excludes."""
    import optimizers

    return "\n\n".join(_method(name) for name in optimizers.available())


def method(name: str) -> str:
    """One method: what it is, and each hyper-parameter with its default, range and advice."""
    import optimizers
    from membench.config.defaults import in_comparison
    from optimizers.described import hyperparameters

    blocks = [_method(name)]
    for one in hyperparameters(optimizers.get(name)):
        head = f"{one.name} = {one.default!r}" + (f"   ({one.allowed})" if one.allowed else "")
        instead = in_comparison(name, one.name)
        told = [one.advice, *([f"In a comparison, unless given: {instead}."] if instead else [])]
        blocks.append("\n".join([head, *(textwrap.indent(textwrap.fill(text, 100), "    ") for text in told)]))
    return "\n\n".join(blocks) + f"\n\nSet one with --set {name}.KEY=VALUE."


def _method(name: str) -> str:
    import optimizers

    method = optimizers.get(name)
    rows = {"paper": method.paper, "trains": method.trains, "keeps": method.keeps, "excludes": method.excludes}
    lines = [f"    {key + ':':9} {text}" for key, text in rows.items() if text]
    return "\n".join([f"{name}: {method.summary}", *lines])


def task_names() -> str:
    """Every task that can be trained, one per line, and what else --task takes."""
    import tasks

    return "\n".join([*tasks.available(), "", "or package.module:Task, a task of your own"])


def models() -> str:
    """The built-in configurations, the packaged models, and what else --model takes."""
    from tasks.models import packaged, source

    lines = ["random weights:", *(f"  config:{name}" for name in source.CONFIGURATIONS)]
    lines += ["pretrained, from a Python package:", *(f"  {name}" for name in packaged.PACKAGED)]
    return "\n".join([*lines, "or a hub id (ID or ID@REVISION), or a folder with config.json and weights"])


def reproductions() -> str:
    """The published tables that `membench reproduce` makes again."""
    from membench.reproduce.recipes import RECIPES
    from reports import published

    return "\n".join(f"{name:16} {published.load(name)['title']}" for name in RECIPES)
