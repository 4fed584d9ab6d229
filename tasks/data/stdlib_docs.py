"""English text that every Python has: `pydoc_data.topics` and the docstrings of the standard library.

Read from the source files, so nothing is imported or run, and the text is the same in every process of one Python.
"""

import ast
import functools
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics
from typing import NamedTuple

from tasks.data import cache

PACKAGES: tuple[str, ...] = (
    "asyncio",
    "collections",
    "concurrent",
    "ctypes",
    "email",
    "html",
    "http",
    "importlib",
    "json",
    "logging",
)
PACKAGES += ("multiprocessing", "sqlite3", "unittest", "urllib", "wsgiref", "xml", "xmlrpc", "zoneinfo")
SHORTEST = 80  # characters of a document

_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class Entry(NamedTuple):
    """Something in the standard library that has a docstring."""

    module: str  # "os.path"
    name: str  # in its module, "" for the module itself: "Path.exists"
    arguments: tuple[str, ...] | None  # None: a class or a module
    documentation: str


def documents() -> list[str]:
    """Texts of one or more sentences, without duplicates: the language reference's topics, and docstrings."""
    texts = [*topics.topics.values(), *(entry.documentation for entry in entries())]
    return list(dict.fromkeys(text for text in map(str.strip, texts) if len(text) >= SHORTEST))


@functools.lru_cache(maxsize=1)
def entries() -> tuple[Entry, ...]:
    """Everything that is documented, in the order of files and lines."""
    key = cache.digest("library", sys.version, ",".join(PACKAGES), str(_root()))
    rows = json.loads(cache.text(key, lambda: json.dumps(list(_entries()))))
    return tuple(Entry(row[0], row[1], None if row[2] is None else tuple(row[2]), row[3]) for row in rows)


def _root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _entries() -> Iterator[Entry]:
    root = _root()
    paths = [*root.glob("*.py"), *(path for name in PACKAGES for path in (root / name).rglob("*.py"))]
    for path in sorted(paths):
        parts = path.relative_to(root).with_suffix("").parts
        if not any(part.startswith("_") or part in ("test", "tests") for part in parts if part != "__init__"):
            module = ".".join(part for part in parts if part != "__init__")
            yield from _of(ast.parse(path.read_bytes()), module, "")


def _of(node: ast.Module | ast.ClassDef, module: str, name: str) -> Iterator[Entry]:
    """The docstrings of a module or class and its members; private ones say little."""
    documentation = ast.get_docstring(node)
    if documentation:
        yield Entry(module, name, None, documentation)
    for child in node.body:
        if isinstance(child, _DEFINITIONS) and not child.name.startswith("_"):
            own = f"{name}.{child.name}".removeprefix(".")
            if isinstance(child, ast.ClassDef):
                yield from _of(child, module, own)
            elif documentation := ast.get_docstring(child):
                yield Entry(module, own, _arguments(child.args), documentation)


def _arguments(given: ast.arguments) -> tuple[str, ...]:
    named = [*given.posonlyargs, *given.args, *([given.vararg] if given.vararg else []), *given.kwonlyargs]
    return tuple(one.arg for one in named if one.arg not in ("self", "cls"))
