"""The command line of a class of options: what `membench.config.options` declares, as typer wants it."""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from membench.config.declare import Declared, declared
from membench.config.values import annotations

Command = Callable[..., None]


def takes(owner: type) -> Callable[[Command], Command]:
    """Gives a command the options of `owner` in place of its `**given`, which gets those that a user gave."""
    known, kinds = declared(owner), annotations(owner)

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def call(**values: Any) -> None:
            command(**{name: value for name, value in values.items() if name not in known or value is not None})

        own = inspect.signature(command, eval_str=True).parameters.values()
        kept = [p.replace(kind=p.KEYWORD_ONLY) for p in own if p.kind is not p.VAR_KEYWORD]
        arguments, others = ([p for p in kept if (p.default is p.empty) is first] for first in (True, False))
        options = [_parameter(one, kinds[name]) for name, one in known.items()]
        call.__signature__ = inspect.Signature([*arguments, *options, *others])  # type: ignore[attr-defined]
        return call

    return decorate


def _parameter(one: Declared, annotation: Any) -> inspect.Parameter:
    """What isn't given is None: the default may be a profile's or a file's."""
    said = one.option
    info = typer.Option(
        *one.flags, help=said.help.format(default=one.default), metavar=said.metavar, show_default=False
    )
    kind = list[str] if said.parse else _on_the_command_line(annotation)
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(one.name, keyword, default=None, annotation=Annotated[kind | None, info])


def _on_the_command_line(annotation: Any) -> type:
    """A type that typer converts a text to; the rest is done where values from files are converted, too."""
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(kind for kind in get_args(annotation) if kind is not types.NoneType)
    return str if get_origin(annotation) in (Literal, tuple) else annotation
