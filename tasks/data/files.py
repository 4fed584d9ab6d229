"""Users' files of texts or of JSON: one file or a folder of them, also packed with gzip."""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from tasks.data.json_lines import Row, decode, lines_of, parse

JSON = (".jsonl", ".jsonl.gz", ".json", ".json.gz")


def find(data: str, suffixes: Sequence[str], what: str) -> list[Path]:
    """The file `data`, or the files of that folder (not below), sorted by name, that end in one of `suffixes`.

    Raises:
        ValueError: there is none; `what` says what `data` may be instead.
    """
    path = Path(data)
    files = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
    fitting = [file for file in files if file.is_file() and file.name.endswith(tuple(suffixes))]
    if not fitting:
        raise ValueError(f"data {data!r} is neither {what} nor a file or folder of files in {', '.join(suffixes)}")
    return fitting


def read(path: Path) -> bytes:
    """A file's bytes, unpacked. Raises ValueError for a broken gzip file."""
    content = path.read_bytes()
    if path.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a complete gzip file ({error})") from error


def sha256(paths: Sequence[Path]) -> str:
    """Of the files' bytes, one after the other."""
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def text(path: Path) -> str:
    """A file's text. Raises ValueError where it is empty or not UTF-8."""
    return decode(str(path), read(path))


def rows(path: Path) -> Iterator[Row]:
    """The objects of a file of JSON lines (blank lines are none), or of one JSON array.

    Raises:
        ValueError: the file is empty, not UTF-8 or not JSON, or something in it is no object; with its place.
    """
    content = read(path)
    where = str(path)
    if content.lstrip()[:1] == b"[":
        for index, value in enumerate(_array(where, decode(where, content)), start=1):
            yield Row(f"{where}, item {index}", value)
        return
    for line in lines_of(where, content).lines:
        if line.text.strip():
            yield parse(line)


def _array(where: str, text: str) -> list:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}, line {error.lineno}: not valid JSON ({error.msg})") from error
