"""On another machine: a call in a process of its own there, and the files that it reads and writes on their way."""

import functools
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from membench.config.run import shards_of
from membench.runs import processes, worker
from membench.runs.processes import Outcome

Files = Mapping[str, bytes]  # by their path beside the one that was packed


@functools.cache
def start_server() -> None:
    processes.start_server()


def carry_out(
    function: Callable[..., Any], arguments: tuple[Any, ...], log: Path, on_message: Callable[[Any], None]
) -> Outcome:
    """As `processes.call`, with what this machine is; the first of the arguments is a run."""
    start_server()
    return processes.call(worker.shown, worker.cards_shown(), function, *arguments, log=log, on_message=on_message)


def pack(path: Path) -> Files:
    """A file, with the shards that belong to a checkpoint, or all files of a folder; nothing, if it doesn't exist."""
    while True:
        before = _changed(path)
        folder = path if path.is_dir() else shards_of(path)
        found = [file for file in (path, *folder.rglob("*")) if file.is_file()]
        with suppress(FileNotFoundError):  # a newer checkpoint has taken its place
            files = {str(file.relative_to(path.parent)): file.read_bytes() for file in found}
            if _changed(path) == before:
                return files


def _changed(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def unpack(files: Files, path: Path) -> None:
    """Write what `pack` has read of a path with this name to `path`: its shards before a checkpoint."""
    for name, content in sorted(files.items(), key=lambda item: "/" not in item[0]):
        file = path.parent / name
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.tmp")
        temporary.write_bytes(content)
        temporary.replace(file)  # whoever is killed meanwhile leaves no half of a checkpoint
