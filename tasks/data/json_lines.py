"""Rows from JSON: one object per line, or all of them in an array."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tasks.data.rows import SURROGATE, Row, RowError, mend

ESCAPED = "\\ud"  # how surrogate halves begin in JSON, in lower case; most of them are in pairs
LONGEST_NUMBER = 100  # digits; Python refuses whole numbers of more than 4,300
TOO_DEEP = "nested too deeply"


def of_lines(where: str, text: str) -> Iterator[Row | RowError]:
    """The rows of JSON lines, or an error for a line that isn't one. Blank lines are skipped.

    Raises:
        ValueError: objects span lines.
    """
    spans = list(_spans(text))
    if spans and min(spans) > 1:
        raise ValueError(
            f"{where}: the first object spans {spans[0]:,} lines: give one object per line, or an array of them"
        )
    # not str.splitlines(), which also splits at U+2028 and others that JSON strings may contain
    for number, line in enumerate(text.split("\n"), 1):
        line = line.lstrip("\ufeff")  # concatenated files, each beginning with a byte-order mark
        if line.strip():
            yield _parsed(f"{where}, line {number}", line)


def _spans(text: str) -> Iterator[int]:
    """How many lines each of the first two values spans, as far as they are JSON."""
    decoder, rest = json.JSONDecoder(parse_int=_number), text
    for _ in range(2):
        rest = rest.lstrip("\ufeff \t\r\n")
        try:
            _, end = decoder.raw_decode(rest)
        except (json.JSONDecodeError, RecursionError):
            return
        yield 1 + rest.count("\n", 0, end)
        rest = rest[end:]


def of_array(where: str, text: str) -> Iterator[Row | RowError]:
    """The rows of one JSON array, or an error for an item that isn't one.

    Raises:
        ValueError: it isn't valid JSON, so it isn't clear where its items end.
    """
    try:
        values = _parse(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}, line {error.lineno}: not valid JSON ({error.msg})") from error
    except RecursionError as error:
        raise ValueError(f"{where}: {TOO_DEEP}") from error
    mended = _may_need_mending(text)
    for number, value in enumerate(values, 1):
        yield _row(f"{where}, item {number}", value, mended=mended)


def _parsed(where: str, line: str) -> Row | RowError:
    try:
        value = _parse(line)
    except json.JSONDecodeError as error:
        return RowError(where, "not valid JSON", f" at character {error.pos + 1} ({error.msg})")
    except RecursionError:
        return RowError(where, TOO_DEEP)
    return _row(where, value, mended=_may_need_mending(line))


def _row(where: str, value: Any, *, mended: bool) -> Row | RowError:
    if isinstance(value, _Ambiguous):
        return RowError(where, str(value))
    try:
        value, count = mend(value) if mended else (value, 0)
        return Row(where, value, mended=count)
    except RecursionError:
        return RowError(where, TOO_DEEP)
    except RowError as error:
        return error


def _parse(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_object, parse_int=_number)


@dataclass(frozen=True)
class _Ambiguous:
    """Stands for an object with a duplicate name: it isn't clear which of the values is meant."""

    name: str

    def __str__(self) -> str:
        return f"an object has {self.name!r} twice"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Ambiguous:
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    return _Ambiguous(Counter(name for name, _ in pairs).most_common(1)[0][0])


def _number(digits: str) -> int | float:
    return int(digits) if len(digits) < LONGEST_NUMBER else float(digits)


def _may_need_mending(text: str) -> bool:
    return ESCAPED in text.lower() or SURROGATE.search(text) is not None
