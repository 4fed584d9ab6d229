"""Values that users write, as text or TOML, converted to what an annotation asks for."""

import ast
import inspect
import os
import types
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

_TOO_LARGE = 10**308  # for a float
_CONSTANTS = {"true": True, "false": False, "none": None}
_LONGEST = 60  # letters or digits of a value
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "none"}


def shortened(value: Any) -> str:
    """A value as errors show it, however long it is."""
    if isinstance(value, int) and abs(value) >= 10**_LONGEST:
        return f"a whole number of more than {_LONGEST} digits"  # Python refuses to write those of 4,300
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def parse(text: str) -> Any:
    """The value that `text` means: 50, 1e-5, true, none, 0.9,0.95; anything else is a string."""
    if text.strip().lower() in _CONSTANTS:
        return _CONSTANTS[text.strip().lower()]
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # the last two of brackets without end
        return text


def convert(value: Any, annotation: Any) -> Any:
    """Convert `value` to `annotation`: a whole number becomes a float, a list or a single item a tuple.

    Numbers of numpy and torch become Python's, paths texts.

    Raises:
        TypeError: that's impossible; the message says what it must be ("a whole number or none").
    """
    value = _plain(value)
    if annotation is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < _TOO_LARGE:
        return float(value)
    if annotation in _WORDS:
        if type(value) is annotation or (annotation is types.NoneType and value is None):
            return value
        raise TypeError(describe(annotation))
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return _first_that_fits(value, annotation)
    if origin is Literal:
        if value in get_args(annotation):
            return value
        raise TypeError(describe(annotation))
    if origin in (tuple, list, Sequence, Iterable, Collection):
        return _items(value, annotation)
    if origin in (dict, Mapping) and not isinstance(value, Mapping):
        raise TypeError(describe(annotation))
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def describe(annotation: Any) -> str:
    """An annotation in words."""
    if annotation is None or annotation in _WORDS:
        return _WORDS[annotation or types.NoneType]
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(map(describe, args))
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (tuple, list, Sequence, Iterable, Collection):
        kinds = [kind for kind in args if kind is not Ellipsis]
        if kinds and get_origin(kinds[0]) is Literal:
            return f"a list of some {describe(kinds[0]).removeprefix('one ')}"
        return "a list" if not kinds else f"a list of {describe(kinds[0]).removeprefix('a ')}s"
    return "values by name" if origin in (dict, Mapping) else str(annotation)


def _first_that_fits(value: Any, annotation: Any) -> Any:
    members = get_args(annotation)
    exact = [member for member in members if member is type(value)]
    for member in [*exact, *members]:
        try:
            return convert(value, member)
        except TypeError:
            continue
    if types.NoneType in members and isinstance(value, str) and parse(value) is None:
        return None  # TOML has no other word for it
    raise TypeError(describe(annotation))


def _items(value: Any, annotation: Any) -> tuple:
    kinds = get_args(annotation)
    written = isinstance(value, str)  # as one text, of the command line: in a list "1" is a text, no number
    if written:
        value = tuple(part.strip() for part in value.split(",") if part.strip())
    one = not isinstance(value, Iterable) or isinstance(value, bytes | Mapping)
    value = (value,) if one else tuple(value)
    if len(kinds) > 1 and Ellipsis not in kinds:
        if len(kinds) != len(value):
            raise TypeError(f"{len(kinds)} values")
    else:
        kinds = (kinds[0] if kinds else Any,) * len(value)
    try:
        pairs = zip(value, kinds, strict=True)
        return tuple(convert(parse(item) if written and kind is not str else item, kind) for item, kind in pairs)
    except TypeError:
        raise TypeError(describe(annotation)) from None


def annotations(function: Any) -> dict[str, Any]:
    """Parameter annotations of a class or function; none if a name in them can't be resolved."""
    try:
        signature = inspect.signature(function, eval_str=True)
    except NameError:  # imported for type checkers only: such a method checks its values itself
        return {}
    return {name: parameter.annotation for name, parameter in signature.parameters.items()}
