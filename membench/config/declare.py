"""An option is a dataclass field that says all of itself: command line, files, checks and records follow from it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any, Literal

from membench.config.errors import UserError
from membench.config.values import annotations, convert

_KEY = "option"  # of a field's metadata


@dataclass(frozen=True)
class Option:
    """What is declared of a field beside its name, type and default.

    Attributes:
        help: for the command line; `{default}` stands for the default.
        flags: on the command line, where they aren't the field's own name (`--batch-size`).
        metavar: what stands for its value there, if not its type.
        parse: makes its value of the texts of a flag that may be given several times.
        more_than, at_least, below: bounds of a number, or of each one in a list. Infinity is never within them.
        check: called with the flag and the value; raises UserError.
        recorded: whether a record's section `training` has it; looked at in `TrainingOptions` alone, as the next two.
        record_as: its name there, where that isn't the field's own.
        identifies: whether a run with another value has another id. An option that comes later leaves the ids of
            earlier runs as they are with "unless default".
    """

    help: str
    flags: tuple[str, ...] = ()
    metavar: str | None = None
    parse: Callable[[Sequence[str]], Any] | None = None
    more_than: float | None = None
    at_least: float | None = None
    below: float | None = None
    check: Callable[[str, Any], None] | None = None
    recorded: bool = True
    record_as: str | None = None
    identifies: Literal["always", "unless default", "never"] = "unless default"

    def allows(self, value: float) -> bool:
        """Is a number within the bounds? A NaN never is."""
        return (
            (self.more_than is None or value > self.more_than)
            and (self.at_least is None or value >= self.at_least)
            and value < (float("inf") if self.below is None else self.below)
        )

    @property
    def bounds(self) -> str:
        """What a number must be, in words."""
        words = {"more than": self.more_than, "at least": self.at_least, "below": self.below}
        return " and ".join(f"{word} {bound}" for word, bound in words.items() if bound is not None) or "finite"


@dataclass(frozen=True)
class Declared:
    """A field with what is declared of it."""

    name: str
    default: Any
    option: Option

    @property
    def flags(self) -> tuple[str, ...]:
        return self.option.flags or ("--" + self.name.replace("_", "-"),)

    @property
    def flag(self) -> str:
        """What errors call it."""
        return self.flags[0].partition("/")[0]


def option(default: Any, help: str, **said: Any) -> Any:
    """A field with its default and what else is declared of it: the attributes of `Option`."""
    metadata = {_KEY: Option(help, **said)}
    if isinstance(default, Mapping):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def like(owner: type, name: str, **changes: Any) -> Any:
    """The option `name` of another class, with what changes: its default, or attributes of `Option`."""
    known = declared(owner)[name]
    default = changes.pop("default", known.default)
    return option(default, **{**vars(known.option), **changes})


def declared(owner: Any) -> dict[str, Declared]:
    """The options of a class, or of an instance of it, by the names of their fields, in their order."""
    return {field.name: _declared(field) for field in dataclasses.fields(owner) if _KEY in field.metadata}


def _declared(field: dataclasses.Field) -> Declared:
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return Declared(field.name, default, field.metadata[_KEY])


def typed(owner: type, given: Mapping[str, Any], where: str | None = None) -> dict[str, Any]:
    """Values that users wrote as the fields of `owner` want them; `where` is the file that they come from.

    What a command line gives several times is its list of texts, or the value.

    Raises:
        UserError: a value of the wrong type.
    """
    kinds, known = annotations(owner), declared(owner)
    return {name: _typed(known[name], value, kinds[name], where) for name, value in given.items()}


def _typed(one: Declared, value: Any, kind: Any, where: str | None) -> Any:
    if one.option.parse is not None and isinstance(value, list):
        return one.option.parse(value)
    try:
        return convert(value, kind)
    except TypeError as error:
        raise UserError(f"{f'{where}: {one.name}' if where else one.flag} must be {error}, not {value!r}") from error


def shared(owner: type, source: Any) -> dict[str, Any]:
    """The fields of `owner` as `source`, which is made from it, has them."""
    return {field.name: getattr(source, field.name) for field in dataclasses.fields(owner)}


def hold_to_bounds(values: Any) -> None:
    """Hold an instance to what its options declare.

    Raises:
        UserError: a value is out of bounds, a list is empty, or an option's own check refuses it.
    """
    for name, one in declared(values).items():
        value = getattr(values, name)
        if value == ():
            raise UserError(f"{one.flag} is empty: give at least one")
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, int | float) and not one.option.allows(item):
                finite = "finite and " if isinstance(item, float) and one.option.below is None else ""
                raise UserError(f"{one.flag} must be {finite}{one.option.bounds}, not {item}")
        if one.option.check is not None and value is not None:
            one.option.check(one.flag, value)
