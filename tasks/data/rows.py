"""Rows of users' data: objects whose fields are checked when read, and errors for rows that can't be used."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

SURROGATE = re.compile("[\ud800-\udfff]")  # half of a pair, or (decoded with surrogateescape) a byte that isn't UTF-8
REPLACEMENT = "\ufffd"
EXACT = 2**53  # floating-point numbers below it hold every whole number


class RowError(ValueError):
    """A row that can't be used.

    Args:
        where: its place, "RTE/train.jsonl, line 3".
        reason: what is wrong, in the same words for all rows with the same fault.
        found: what was found instead; follows the reason in the message.
    """

    def __init__(self, where: str, reason: str, found: str = ""):
        super().__init__(f"{where}: {reason}{found}")
        self.where, self.reason, self.found = where, reason, found


class Row:
    """An object whose fields are checked when they are read, and which remembers which were.

    Args:
        where: its place, for messages.
        value: a JSON object; surrogate halves in it are replaced by U+FFFD and counted in `mended`.
        prefix: of its fields' names, "messages[]." for a row within another one.

    Raises (from every reader too):
        RowError: it isn't an object, or a field is missing or not what it must be.
    """

    def __init__(self, where: str, value: Any, *, prefix: str = "", mended: int = 0):
        if not isinstance(value, dict):
            raise RowError(where, "expected a JSON object", f", got {short(value)}")
        self.where, self.value, self.mended = where, value, mended
        self._prefix = prefix
        self._read_fields: set[str] = set()
        self._within: list[Row] = []

    def has(self, name: str) -> bool:
        """Is there a field with that name that isn't null?"""
        return self.value.get(name) is not None

    def get(self, name: str) -> Any:
        """The field, whatever it is; None if it is missing."""
        self._read_fields.add(name)
        return self.value.get(name)

    def text(self, name: str) -> str:
        """The field, a text."""
        return self._checked(name, str, "text")

    def integer(self, name: str) -> int:
        """The field, a whole number."""
        return self._checked(name, int, "a whole number")

    def plain(self, name: str) -> bool | int | str:
        """The field, a text, a whole number (1.0 is one, as pandas writes it), or true or false."""
        value = self.value.get(name)
        if isinstance(value, float) and value.is_integer() and abs(value) < EXACT:
            return int(self.get(name))
        return self._checked(name, bool | int | str, "text or a whole number")

    def row(self, name: str) -> "Row":
        """The field, an object."""
        return self._part(f"{self.where}, {name}", self._checked(name, dict, "an object"), f"{name}.")

    def rows(self, name: str) -> list["Row"]:
        values = self._checked(name, list, "a list")
        if not values:
            raise RowError(self.where, f"{name!r} is an empty list")
        return [self._part(f"{self.where}, {name}[{i}]", value, f"{name}[].") for i, value in enumerate(values)]

    def label(self, *values: bool | int | str, name: str = "label") -> int:
        """The index of the field's value in `values`."""
        value = self._checked(name, object, "")
        for index, known in enumerate(values):
            if value == known and type(value) is type(known):
                return index
        known = ", ".join(json.dumps(value) for value in values)
        raise RowError(self.where, f"{name!r} must be one of {known}", f", got {short(value)}")

    def unused(self) -> Iterator[str]:
        """Names of the non-empty fields that were never read, here and in nested rows."""
        for name, value in self.value.items():
            if name not in self._read_fields and value not in (None, "", [], {}):
                yield f"{self._prefix}{name}"
        for part in self._within:
            yield from part.unused()

    def _part(self, where: str, value: Any, prefix: str) -> "Row":
        self._within.append(Row(where, value, prefix=f"{self._prefix}{prefix}"))
        return self._within[-1]

    def _checked(self, name: str, kind: Any, words: str) -> Any:
        if name not in self.value:
            raise RowError(self.where, f"the field {name!r} is missing", f"; there are {listed(self.value)}")
        value = self.get(name)
        # a bool is an int in Python, but not in JSON
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise RowError(self.where, f"{name!r} must be {words}", f", got {short(value)}")
        return value


def short(value: Any) -> str:
    """A value as JSON, shortened if it is long."""
    try:
        text = json.dumps(value, default=str)
    except RecursionError:
        return "something nested very deeply"
    return text if len(text) <= 60 else f"{text[:57]}..."


def listed(names: Iterable[str], separator: str = ", ") -> str:
    """A list of names, cut short if there are many; control characters are escaped."""
    text = separator.join(name if name.isprintable() else ascii(name) for name in names) or "none"
    return text if len(text) <= 200 else f"{text[:197]}..."


def mend(value: Any) -> tuple[Any, int]:
    """The value with U+FFFD for whatever isn't a character in its texts, and how many of those there were."""
    if isinstance(value, str):
        return SURROGATE.subn(REPLACEMENT, value)
    if isinstance(value, list):
        items = [mend(item) for item in value]
        return [item for item, _ in items], sum(count for _, count in items)
    if isinstance(value, dict):
        names, count = mend(list(value))
        items, more = mend(list(value.values()))
        return dict(zip(names, items, strict=True)), count + more
    return value, 0
