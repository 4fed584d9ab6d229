"""On another machine: a call in a process of its own there, and the files that it reads and writes on their way."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from membench.runs import processes, worker
from membench.runs.processes import Outcome

Files = Mapping[str, bytes]  # by their path below that of the folder; a single file's is "."


@functools.cache
def start_server() -> None:
    processes.start_server()


def carry_out(
    function: Callable[..., Any], arguments: tuple[Any, ...], log: Path, on_message: Callable[[Any], None]
) -> Outcome:
    """As `processes.call`, with what this machine is; the first of the arguments is a run."""
    start_server()
    return processes.call(worker.placed, function, *arguments, log=log, on_message=on_message)


def pack(path: Path) -> Files:
    """A file, or all files of a folder; nothing, if it doesn't exist."""
    found = path.rglob("*") if path.is_dir() else [path]
    return {str(file.relative_to(path)): file.read_bytes() for file in found if file.is_file()}


def unpack(files: Files, path: Path) -> None:
    """Write what `pack` has read to `path`."""
    for name, content in files.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.tmp")
        temporary.write_bytes(content)
        temporary.replace(file)  # whoever is killed meanwhile leaves no half of a checkpoint
