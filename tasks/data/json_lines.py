"""Lines of JSON from users' files: decoded, parsed and checked, and whatever is wrong named with its place."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any, NamedTuple


class Line(NamedTuple):
    """One line of JSON, and where it stands."""

    where: str  # "RTE/train.jsonl, line 3"
    text: str


@dataclass(frozen=True)
class Lines:
    """All lines of one file."""

    where: str
    lines: list[Line]
    sha256: str  # of the file's bytes


def lines_of(where: str, content: bytes) -> Lines:
    """The lines of a file's bytes.

    Raises:
        ValueError: it is empty or not UTF-8; the message begins with `where`.
    """
    lines = [Line(f"{where}, line {number}", line) for number, line in enumerate(_split(decode(where, content)), 1)]
    return Lines(where, lines, hashlib.sha256(content).hexdigest())


def decode(where: str, content: bytes) -> str:
    """A file's bytes as text. Raises ValueError, as `lines_of` does."""
    if not content.strip():
        raise ValueError(f"{where}: the file is empty, but it must have at least one example")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{where}, line {line}: not UTF-8 text ({error.reason})") from error


def _split(text: str) -> list[str]:
    # not str.splitlines(): that also splits at U+2028 and others, which JSON strings may contain
    return text.removesuffix("\n").split("\n")


class Row:
    """A JSON object whose fields are checked when they are read.

    Raises (all readers):
        ValueError: the field is missing or isn't what it must be; the message has the place.
    """

    def __init__(self, where: str, value: Any):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected a JSON object, got {short(value)}")
        self.where, self.value = where, value

    def _read(self, name: str, kind: Any, words: str) -> Any:
        if name not in self.value:
            raise ValueError(
                f"{self.where}: the field {name!r} is missing; there are {', '.join(self.value) or 'none'}"
            )
        value = self.value[name]
        # a bool is an int in Python, but not in JSON
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"{self.where}: {name!r} must be {words}, got {short(value)}")
        return value

    def text(self, name: str) -> str:
        return self._read(name, str, "a text")

    def integer(self, name: str) -> int:
        return self._read(name, int, "a whole number")

    def plain(self, name: str) -> bool | int | str:
        return self._read(name, bool | int | str, "a text or a whole number")

    def row(self, name: str) -> "Row":
        return Row(f"{self.where}, {name}", self._read(name, dict, "an object"))

    def rows(self, name: str) -> list["Row"]:
        values = self._read(name, list, "a list")
        if not values:
            raise ValueError(f"{self.where}: {name!r} is an empty list")
        return [Row(f"{self.where}, {name}[{index}]", value) for index, value in enumerate(values)]

    def label(self, *values: bool | int | str, name: str = "label") -> int:
        """The index of the field's value in `values`."""
        value = self._read(name, object, "")
        for index, known in enumerate(values):
            if value == known and type(value) is type(known):
                return index
        known = ", ".join(json.dumps(value) for value in values)
        raise ValueError(f"{self.where}: {name!r} must be one of {known}, got {short(value)}")


def short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def parse(line: Line) -> Row:
    """Parse one line of a jsonl file. Raises ValueError with file and line when it isn't a JSON object."""
    try:
        return Row(line.where, json.loads(line.text))
    except json.JSONDecodeError as error:
        raise ValueError(f"{line.where}: not valid JSON at character {error.pos + 1} ({error.msg})") from error
