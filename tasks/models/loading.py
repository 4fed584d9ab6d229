"""Finding and loading what transformers can load: one sentence if it fails, and nothing printed if it doesn't."""

import contextlib
import functools
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from transformers.utils import logging

from tasks.models.damage import said_in_a_sentence

LONGEST_ID = 200  # characters in an id with its revision
FOLDER = "sha256:"  # prefix of a folder's revision, which is a digest of its files


def locate(name: str) -> tuple[str, str]:
    """A folder with a digest of its files, or a hub id with the commit that its revision stands for.

    Raises:
        ValueError: it is neither a folder nor reachable on the hub.
    """
    if is_folder(name):
        return name, f"{FOLDER}{digest(Path(name))}"
    repository, revision = on_hub("model", name)
    from huggingface_hub import hf_hub_download

    with said_in_a_sentence("model", name, "a folder, or a model that `membench list models` names"):
        config = hf_hub_download(repository, "config.json", revision=revision)
    return repository, Path(config).parent.name  # .../snapshots/COMMIT/config.json


def is_folder(name: str) -> bool:
    """Is it the path of a folder? False for an impossible path."""
    return os.path.isdir(name)


def on_hub(what: str, name: str) -> tuple[str, str | None]:
    """Split `ID@REVISION`.

    Raises:
        ValueError: `name` is a file, or can't be an id, so that it must have meant a folder.
    """
    if os.path.isfile(name):
        raise ValueError(f"can't load the {what} {name[-100:]!r}: it is a file; give the folder with all of its files")
    repository, _, revision = name.partition("@")
    if name.startswith((".", "/", "~")) or repository.count("/") > 1 or not repository or len(name) > LONGEST_ID:
        raise ValueError(f"there is no folder {name[:100]!r} to load the {what} from, and it can't be a hub id")
    return repository, revision or None


def digest(folder: Path, names: Iterable[str] | None = None) -> str:
    """SHA-256 over the names and contents of a folder's files (or those of `names` that exist).

    Raises:
        ValueError: there is a pipe or a device in the place of one, which whoever reads it might wait for without end.
    """
    paths = sorted(folder.iterdir()) if names is None else list(map(folder.joinpath, names))
    if none := next((path for path in paths if path.exists() and not (path.is_file() or path.is_dir())), None):
        raise ValueError(f"{none}: a pipe or a device, not a file: remove it, or give another folder")
    stamps = ((path, path.stat()) for path in paths if path.is_file())
    return _digest_of(tuple((path, stat.st_mtime_ns, stat.st_size) for path, stat in stamps))


@functools.lru_cache(maxsize=16)
def _digest_of(files: tuple[tuple[Path, int, int], ...]) -> str:
    """SHA-256 over names and contents; times and sizes only show when to read again."""
    total = hashlib.sha256()
    for path, _, _ in files:
        total.update(path.name.encode())
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and its report of new parameters, which `head` covers."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
