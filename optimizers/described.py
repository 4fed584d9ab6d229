"""What a method says of itself: its docstring in parts, and each hyper-parameter with its default, range and advice."""

from __future__ import annotations

import inspect
import math
import re
from typing import Any, NamedTuple

from optimizers.contract import Subject, build_model
from optimizers.registry import Method

_SECTIONS = ("Args", "Raises", "Returns")
_WRONG: tuple[Any, ...] = ("?", math.nan, -1, -math.inf, 2, (math.nan, math.nan))  # of any kind: one of them is refused
_KINDS = {int: "a whole number", tuple: "name patterns", str: "name patterns"}  # where nothing is refused
_REFUSAL = re.compile(r"must (?:be|have|lie) (.+?), not ", re.DOTALL)


class HyperParameter(NamedTuple):
    """One keyword of a method's constructor."""

    name: str
    default: Any
    allowed: str  # in words
    advice: str


def description(method: Method) -> str:
    """The docstring of a method without what is said of its arguments and errors."""
    return _parts(method)[""]


def hyperparameters(method: Method) -> list[HyperParameter]:
    """Those of a method, in the order of its constructor."""
    said = _advice(_parts(method).get("Args", ""))
    keywords = Subject(method, method.example).keywords
    return [
        HyperParameter(name, value, _allowed(method, name, value), said.get(name, ""))
        for name, value in keywords.items()
    ]


def _parts(method: Method) -> dict[str, str]:
    """The docstring by section; what comes before the first has no name."""
    parts, name = dict[str, list[str]](), ""
    for line in (inspect.getdoc(method) or "").splitlines():
        if line.rstrip(":") in _SECTIONS and line.endswith(":"):
            name = line.rstrip(":")
        else:
            parts.setdefault(name, []).append(line)
    return {name: "\n".join(lines).strip("\n") for name, lines in parts.items()}


def _advice(arguments: str) -> dict[str, str]:
    """What is said of each argument; several may share a line ("betas, eps: as in Adam.")."""
    entries = re.split(r"\n(?=    \S)", "\n" + inspect.cleandoc("\n" + arguments).replace("\n", "\n    "))
    said: dict[str, str] = {}
    for entry in entries:
        names, _, text = " ".join(entry.split()).partition(": ")
        said |= dict.fromkeys(names.split(", "), text)
    return said


def _allowed(method: Method, name: str, default: Any) -> str:
    """The range, in the words with which the method refuses a value outside it."""
    if isinstance(default, bool):
        return "true or false"
    sentences = (_refusal(method, name, value) for value in _WRONG)
    found = next((found[1] for sentence in sentences if (found := _REFUSAL.search(sentence))), "")
    optional = default is None and found and "none" not in found.lower()
    return f"{found} or none" if optional else found or _KINDS.get(type(default), "")


def _refusal(method: Method, name: str, value: Any) -> str:
    try:
        Subject(method, method.example).build(build_model(), **{name: value})
    except ValueError as error:
        return str(error) if str(error).startswith(name) else ""
    except Exception:  # of another type than the constructor can look at
        return ""
    return ""
