"""An option is a dataclass field that declares everything: command line, files, checks and records follow from it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any, Literal

from membench.config.errors import UserError
from membench.config.values import annotations, convert, shortened

_KEY = "option"  # of a field's metadata
LARGEST = 2**31 - 1  # of whole numbers: sizes and counts that nobody has


@dataclass(frozen=True)
class Option:
    """What is declared about a field besides its name, type and default.

    Attributes:
        help: for the command line; `{default}` stands for the default.
        flags: on the command line, if they differ from the field's name (`--batch-size`).
        metavar: the placeholder for its value there, if it isn't the type.
        parse: turns the strings of a flag that may be repeated into the value.
        more_than, at_least, below: bounds of a number, or of each number in a list. Infinity is never within bounds.
        check: called with the flag and the value; raises UserError.
        recorded: is it in a record's section `training`? Like the next two, only used in `TrainingOptions`.
        record_as: its name there, if it differs from the field's.
        identifies: does a run with another value have another id? An option added later keeps the ids of earlier runs
            with "unless default".
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
    """A field with its declaration."""

    name: str
    default: Any
    option: Option

    @property
    def flags(self) -> tuple[str, ...]:
        """Its flags on the command line."""
        return self.option.flags or ("--" + self.name.replace("_", "-"),)

    @property
    def flag(self) -> str:
        """Its name in errors."""
        return self.flags[0].partition("/")[0]


def option(default: Any, help: str, **said: Any) -> Any:
    """A field with its default and the rest of its declaration: the attributes of `Option`."""
    metadata = {_KEY: Option(help, **said)}
    if isinstance(default, Mapping):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def like(owner: type, name: str, **changes: Any) -> Any:
    """The option `name` of another class, with changes: to its default, or to attributes of `Option`."""
    known = declared(owner)[name]
    default = changes.pop("default", known.default)
    return option(default, **{**vars(known.option), **changes})


def declared(owner: Any) -> dict[str, Declared]:
    """The options of a class or its instance by the names of their fields, in order."""
    return {field.name: _declared(field) for field in dataclasses.fields(owner) if _KEY in field.metadata}


def _declared(field: dataclasses.Field) -> Declared:
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return Declared(field.name, default, field.metadata[_KEY])


def typed(owner: type, given: Mapping[str, Any], where: str | None = None) -> dict[str, Any]:
    """Users' values converted to what the fields of `owner` expect; `where` is the file that they come from.

    For a flag that may be repeated, the value is a list of strings, or the final value.

    Raises:
        UserError: a value of the wrong type.
    """
    kinds, known = annotations(owner), declared(owner)
    return {name: _typed(known[name], value, kinds[name], where) for name, value in given.items()}


def _typed(one: Declared, value: Any, kind: Any, where: str | None) -> Any:
    if isinstance(value, str) and not value.strip():
        raise UserError(f"{f'{where}: {one.name}' if where else one.flag} is empty: give a value, or leave it out")
    if one.option.parse is not None and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return one.option.parse(value)
    try:
        return convert(value, kind)
    except TypeError as error:
        raise UserError(
            f"{f'{where}: {one.name}' if where else one.flag} must be {error}, not {shortened(value)}"
        ) from error


def shared(owner: type, source: Any) -> dict[str, Any]:
    """The fields of `owner`, with the values in `source`, which is derived from it."""
    return {field.name: getattr(source, field.name) for field in dataclasses.fields(owner)}


def hold_to_bounds(values: Any) -> None:
    """Check an instance against the declarations of its options.

    Raises:
        UserError: a value is out of bounds, a list is empty, or an option's own check refuses it.
    """
    for name, one in declared(values).items():
        value = getattr(values, name)
        if value == ():
            raise UserError(f"{one.flag} is empty: give at least one")
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, int) and abs(item) > LARGEST:
                raise UserError(f"{one.flag} must be at most {LARGEST}, not {shortened(item)}")
            if isinstance(item, int | float) and not one.option.allows(item):
                finite = "finite and " if isinstance(item, float) and one.option.below is None else ""
                raise UserError(f"{one.flag} must be {finite}{one.option.bounds}, not {item}")
        if one.option.check is not None and value is not None:
            one.option.check(one.flag, value)
