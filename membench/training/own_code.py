"""A digest of the code of a user's own method or task: once it is changed, its runs are other runs."""

import hashlib
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FunctionType, ModuleType

import optimizers
import tasks
from membench.config.errors import is_own


def digests(task: str, method: str) -> dict[str, str]:
    """Those of a task and a method from outside, by their names in a record."""
    modules = {"task_code": tasks.module_of(task), "method_code": optimizers.module_of(method)}
    found = {name: digest(module) for name, module in modules.items() if module is not None}
    return {name: one for name, one in found.items() if one is not None}


def digest(module: str) -> str | None:
    """SHA-256 of the source of a loaded module, and of the user's own modules that it takes modules, classes or
    functions from, and so on; None of one without a file. Installed libraries go by their versions."""
    sources: dict[str, bytes] = {}
    left = [module]
    while left:
        name = left.pop()
        loaded = sys.modules.get(name)
        file = getattr(loaded, "__file__", None)
        if loaded is None or file is None or name in sources or not (name == module or is_own(file)):
            continue
        sources[name] = b""
        with suppress(OSError):  # in an archive
            sources[name] = Path(file).read_bytes()
        left += _used(loaded)
    if module not in sources:
        return None
    total = hashlib.sha256()
    for name in sorted(sources):
        total.update(f"{name}\0{len(sources[name])}\0".encode() + sources[name])
    return total.hexdigest()


def _used(module: ModuleType) -> Iterator[str]:
    """The modules whose parts a module has names for."""
    for value in list(vars(module).values()):
        if isinstance(value, ModuleType):
            yield value.__name__
        else:
            yield (value if isinstance(value, type | FunctionType) else type(value)).__module__
