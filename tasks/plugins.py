"""Third-party tasks: `package.module:Task` by its path, or a name registered by an installed package."""

import contextlib
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

from tasks.base import Family, Task

ENTRY_POINTS = "membench.tasks"  # the group; an entry is a task's class, or a module that is a family of tasks
PLUGGED_IN: set[str] = set()  # modules of tasks from outside
MEMBERS = {*Task.__annotations__, *(name for name in vars(Task) if not name.startswith("_"))}


@dataclass(frozen=True)
class OwnTask:
    """A family with a single task, made by a class (or function) that takes the keywords of `tasks.create`."""

    NAME: str
    make: Callable[..., Any]

    def names(self) -> tuple[str, ...]:
        return ("",)

    def available_in(self, data: str) -> tuple[str, ...]:
        """Its one name; whether its data exist becomes clear when it is built."""
        return self.names()

    def create(self, name: str, **given: Any) -> Task:
        """Raises ValueError if the result isn't a task."""
        try:
            task = self.make(**given)
        except TypeError as error:
            raise ValueError(f"task {self.NAME!r} can't be made: {error}") from error
        missing = sorted(MEMBERS - set(dir(task)))
        if missing:
            raise ValueError(f"task {self.NAME!r} lacks {', '.join(missing)}: see tasks.Task for what a task has")
        return task


def at(path: str) -> Family:
    """The task at `package.module:Task`.

    Raises:
        ValueError: there is none.
    """
    module_name, _, attribute = path.partition(":")
    _look_in_current_folder()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"task {path!r}: {error}; it must be importable from this folder or installed") from error
    except (Exception, SystemExit) as error:  # whatever a user's module does
        raise ValueError(f"task {path!r}: importing {module_name} fails: {type(error).__name__}: {error}") from error
    if attribute not in vars(module):
        raise ValueError(f"task {path!r}: {module_name} has no {attribute!r}")
    PLUGGED_IN.add(module_name)
    return _family(path, vars(module)[attribute])


def _look_in_current_folder() -> None:
    """For a user's own module, which is wanted: the command line looks nowhere in that folder before. Last, so that
    none of its modules shadows another."""
    with contextlib.suppress(FileNotFoundError):  # somebody has deleted it
        if os.getcwd() not in sys.path and "" not in sys.path:
            sys.path.append(os.getcwd())


def installed(name: str | None = None) -> list[Family]:
    """The families of installed packages, or the one with that name, loaded.

    Raises:
        ValueError: one can't be loaded, or is neither a task's class nor a family with that name.
    """
    return [_load(point) for point in entry_points(group=ENTRY_POINTS) if name in (None, point.name)]


def module_of(name: str) -> str | None:
    """The module of a task from outside: a user's own, or an installed package's; None of ours."""
    if ":" in name:
        return name.partition(":")[0]
    family = name.partition("/")[0]
    return next((point.module for point in entry_points(group=ENTRY_POINTS) if point.name == family), None)


def _load(point: EntryPoint) -> Family:
    PLUGGED_IN.add(point.module)
    try:
        return _family(point.name, point.load())
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"task {point.name!r} of an installed package can't be loaded: {type(error).__name__}: {error}"
        ) from error


def _family(name: str, found: Any) -> Family:
    if isinstance(found, ModuleType) and vars(found).get("NAME") == name:
        return found  # type: ignore[return-value]
    if not callable(found):
        raise ValueError(f"task {name!r} must be a class (or function) that makes a task, not {found!r}")
    return OwnTask(name, found)
