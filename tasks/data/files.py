"""Users' files of rows or texts: one file or a folder of them, gzipped or not."""

import codecs
import gzip
import hashlib
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tasks.data import json_lines, tables
from tasks.data.rows import Row, RowError, listed

PLAIN = (".jsonl", ".json", ".csv", ".tsv")
ROWS = (*PLAIN, *(f"{suffix}.gz" for suffix in PLAIN))
GZIP = b"\x1f\x8b"  # the first bytes of such a file, whatever its name
HELD_OUT_NAME = re.compile(
    r"(^|[_.-])(tests?|testing|val|valid|validate|validation|dev|evals?|evaluation|held[_-]?out|holdout)\d*"
    r"( ?\(\d+\))?[_.-]"  # a number as browsers give to a second copy
)
HEAD = 4096  # bytes
ABOUT = ("readme", "license", "licence")  # files that say something of a folder
# so do these, which the library `datasets` writes beside rows
OF_DATASETS = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
MARKS = {  # byte-order marks; the first two begin like the last two
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def find(data: str, suffixes: Sequence[str], what: str) -> list[Path]:
    """The file `data`, or the files in that folder (not below it) that end in one of `suffixes`, sorted by name.

    Of a folder neither hidden files, such as macOS's `._train.jsonl`, nor `OF_DATASETS`.

    Raises:
        ValueError: there is none; `what` says what else `data` may be.
    """
    fitting = [file for file in _files(Path(data)) if file.name.lower().endswith(tuple(suffixes))]
    if not fitting:
        inside = [path.name for path in _inside(Path(data))]
        raise ValueError(
            f"data {data[:100]!r} is neither {what} nor a file or folder of files in {', '.join(suffixes)}"
            + (f"; it has {listed(inside)}" if inside else "")
        )
    return fitting


def passed_over(data: str, suffixes: Sequence[str]) -> list[str]:
    """A note on what is in the folder `data` and isn't read: other endings, hidden files, folders, broken links."""
    inside = _inside(Path(data))
    read = find(data, suffixes, "") if inside else []
    names = [path.name for path in inside if path not in read and not _says_nothing(path.name.lower(), suffixes)]
    return [f"not read: {listed(names)}"] if names else []


def _says_nothing(name: str, suffixes: Sequence[str]) -> bool:
    """Would nobody expect rows in a file of this name, in lower case?"""
    return name.startswith(ABOUT) or (name.startswith(".") and not name.endswith(tuple(suffixes)))


def named_as_tests(paths: Sequence[Path]) -> list[Path]:
    """Those of several files whose names say that they are held out: test.jsonl, gsm8k_test.jsonl, valid.txt."""
    return [path for path in paths if HELD_OUT_NAME.search(path.name.lower())] if len(paths) > 1 else []


def held_out(data: str, suffixes: Sequence[str]) -> list[str]:
    """A note on which files of the folder `data` are held out, since they are named as tests."""
    apart = [path.name for path in named_as_tests(find(data, suffixes, ""))]
    return [f"held out: {listed(apart)}"] if apart else []


def _files(path: Path) -> list[Path]:
    try:
        if path.is_file():
            return [path]
        return [file for file in _inside(path) if file.is_file() and not _is_beside_rows(file.name)]
    except OSError:  # a name that is too long
        return []


def _inside(path: Path) -> list[Path]:
    try:
        return sorted(path.iterdir()) if path.is_dir() else []
    except OSError:  # a name that is too long, a folder without read permission
        return []


def _is_beside_rows(name: str) -> bool:
    return name.startswith(".") or name in OF_DATASETS


def read(path: Path) -> bytes:
    """A file's bytes, unpacked. Raises ValueError if it can't be read, or is a broken gzip file."""
    with _named(path):
        content = path.read_bytes()
        return gzip.decompress(content) if content.startswith(GZIP) else content


def head(path: Path) -> bytes:
    """A file's first bytes, unpacked. Raises ValueError if it can't be read."""
    with _named(path), path.open("rb") as file:
        packed = file.read(len(GZIP)) == GZIP
        file.seek(0)
        return (gzip.open(file) if packed else file).read(HEAD)


def sha256(paths: Sequence[Path]) -> str:
    """SHA-256 of the SHA-256s of the files, in order. Raises ValueError if one can't be read."""
    total = hashlib.sha256()
    for path in paths:
        with _named(path), path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
        if _format(path.name) == ".tsv":  # as .csv the same bytes are other texts, without quotes
            total.update(b".tsv")
    return total.hexdigest()


def _format(name: str) -> str:
    return Path(name.lower().removesuffix(".gz")).suffix


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn an error of reading a file, which needn't say of which, into a ValueError that does."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a complete gzip file ({error})") from error
    except OSError as error:
        raise ValueError(f"{path}: can't be read ({error.strerror})") from error


@dataclass(frozen=True)
class File:
    """Bytes of rows; the ending of `where`, the name used in messages, gives their format."""

    where: str
    content: bytes

    @classmethod
    def at(cls, path: Path) -> "File":
        """The file at a path. Raises ValueError if it can't be read."""
        return cls(str(path), read(path))

    @property
    def sha256(self) -> str:
        """SHA-256 of the content."""
        return hashlib.sha256(self.content).hexdigest()

    def rows(self) -> Iterator[Row | RowError]:
        """The rows of JSON lines, a JSON array or a table, and errors for whatever isn't a row.

        Raises:
            ValueError: the file is empty, or it isn't clear where rows begin and end.
        """
        whole, kind = decode(self.where, self.content), _format(self.where)
        if kind == ".csv":
            return tables.of_csv(self.where, whole)
        if kind == ".tsv":
            return tables.of_tsv(self.where, whole)
        is_array = whole.lstrip().startswith("[")
        return (json_lines.of_array if is_array else json_lines.of_lines)(self.where, whole)


def decode(where: str, content: bytes) -> str:
    """A file's bytes as text; bytes that aren't UTF-8 become surrogate halves, see `rows.mend`.

    UTF-16 and UTF-32 are recognised by their byte-order marks. Raises ValueError if the file is empty, or one of those
    without its mark, or no text at all.
    """
    if not content.strip():
        raise ValueError(f"{where}: the file is empty; it must have at least one example")
    for mark, encoding in MARKS.items():
        if content.startswith(mark):
            return content.decode(encoding, errors=HALF)
    if 10 * content.count(0) > len(content):
        raise ValueError(
            f"{where}: it must be UTF-8, but has many zero bytes, as UTF-16 without a byte-order mark: convert it"
        )
    return content.decode("utf-8-sig", errors="surrogateescape")


def _half(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\udcff", error.end


HALF = "membench.half"  # an error handler as surrogateescape, also for encodings in which ASCII may be what is wrong
codecs.register_error(HALF, _half)
