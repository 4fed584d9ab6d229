"""The command line for a class of options: what `membench.config.options` declares, in typer's form."""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from typer.core import TyperCommand

from membench.config.declare import Declared, declared
from membench.config.errors import UserError
from membench.config.values import annotations, parse

Command = Callable[..., None]

_NUMBERS = {int: "<int>", float: "<float>"}  # read by us, so that what is none is named


class EachOptionOnce(TyperCommand):
    """A command that refuses what is given twice, of which click takes the last without a word."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The same, after a look at what is there more than once."""
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for parameter in order:
            if order.count(parameter) > 1 and not parameter.multiple:
                names = "/".join([*parameter.opts, *parameter.secondary_opts])
                raise UserError(f"{names} is given {order.count(parameter)} times: give it once")
        return super().parse_args(ctx, args)


def takes(owner: type) -> Callable[[Command], Command]:
    """Give a command the options of `owner` in place of its `**given`, which receives those that the user set."""
    known, kinds = declared(owner), annotations(owner)
    numbers = {name for name, one in known.items() if not one.option.parse and _plain(kinds[name]) in _NUMBERS}

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def call(**values: Any) -> None:
            given = {name: value for name, value in values.items() if name not in known or value is not None}
            command(**{name: parse(value) if name in numbers else value for name, value in given.items()})

        own = inspect.signature(command, eval_str=True).parameters.values()
        kept = [p.replace(kind=p.KEYWORD_ONLY) for p in own if p.kind is not p.VAR_KEYWORD]
        arguments, others = ([p for p in kept if (p.default is p.empty) is first] for first in (True, False))
        options = [_parameter(one, kinds[name]) for name, one in known.items()]
        call.__signature__ = inspect.Signature([*arguments, *options, *others])  # type: ignore[attr-defined]
        return call

    return decorate


def _parameter(one: Declared, annotation: Any) -> inspect.Parameter:
    """An option that isn't given is None: the default may come from a profile or a file."""
    said = one.option
    metavar = said.metavar or _NUMBERS.get(_plain(annotation))
    info = typer.Option(*one.flags, help=said.help.format(default=one.default), metavar=metavar, show_default=False)
    kind = list[str] if said.parse else _on_the_command_line(annotation)
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(one.name, keyword, default=None, annotation=Annotated[kind | None, info])


def _on_the_command_line(annotation: Any) -> type:
    """A type to which typer converts strings; the rest happens where values from files are converted, too."""
    plain = _plain(annotation)
    return str if plain in _NUMBERS or get_origin(plain) in (Literal, tuple) else plain


def _plain(annotation: Any) -> Any:
    """Without the None that stands for what isn't given."""
    if get_origin(annotation) in (Union, types.UnionType):
        return next(kind for kind in get_args(annotation) if kind is not types.NoneType)
    return annotation
