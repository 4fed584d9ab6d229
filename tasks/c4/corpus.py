"""Documents, tokenised, joined with an end-of-text token and cut into sequences of equal length.

A `Corpus` has all of its documents: sequence i is a function of (seed, i). A `Stream` reads them as they arrive.
"""

import codecs
import functools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from tasks.data import cache, files, stdlib_docs
from tasks.data.files import File
from tasks.data.held_out import HELD_OUT, hash_of, is_held_out
from tasks.data.rows import Row, RowError, mend
from tasks.data.tally import Tally

SUFFIXES = (*files.ROWS, ".txt", ".txt.gz")
SHORTEST = 2000  # characters of a .txt file's documents; only the last may be shorter
LONGEST = 10_000  # for a document that ends at an empty line; a longer one is cut inside
CUTS = (r"((?<=\n)[ \t]*\r?\n)", r"(\n)", r"(\s)", r"()")  # at empty lines; else at ends of lines, at spaces, anywhere
BATCH = 1024  # documents tokenised together
REPEATED = "training documents left out, since they are held out too"

Tokenise = Callable[[Sequence[str]], list[list[int]]]


class Documents:
    """All documents of the demo, a file or a folder.

    Args:
        data: "demo", a file or a folder: rows (.jsonl, .json, .csv, .tsv, packed with gzip or not) with a field `text`,
            or .txt, which is cut at empty lines into documents of at least 2,000 characters. Of a folder, files that
            are named as tests (valid.txt) are held out; without any, documents are by their hash.

    Raises:
        ValueError: there is no such file.
    """

    def __init__(self, data: str):
        self.data = data
        found = [] if data == "demo" else files.find(data, SUFFIXES, "'demo' nor 'hub'")
        self._apart = files.named_as_tests(found)
        self._paths = [path for path in found if path not in self._apart]
        self.sha256 = self._digest()
        self.name = ", ".join(map(str, found)) or data

    def _digest(self) -> str:
        found = [*self._paths, *self._apart]
        if not found:
            return hash_of("\0".join(stdlib_docs.documents())).hex()
        bytes_of = files.sha256(found)
        if self._apart:
            bytes_of = hash_of(f"{files.sha256(self._paths)} {files.sha256(self._apart)}").hex()
        # the same bytes under another name are other documents
        return hash_of(f"{bytes_of} as text").hex() if any(map(_is_text_like_rows, found)) else bytes_of

    def check_unchanged(self) -> None:
        """Raises ValueError if what was read since may not be what the digest is of."""
        if self._digest() != self.sha256:
            raise ValueError(f"{self.name}: changed while it was read: give the command again once it is written")

    def read(self, tally: Tally) -> Iterator[str]:
        """Each document; the tally notes what happens to the files' rows.

        Raises:
            ValueError: a file can't be read, or more than half of its rows can't be used.
        """
        if self.name == "demo":
            yield from stdlib_docs.documents()
        for path, text in self._in(self._paths, tally):
            if self._apart and self.is_held_out(text):
                tally.mend(REPEATED, str(path))
            else:
                yield text
        for _, text in self._in(self._apart, tally):
            yield text

    def _in(self, paths: Sequence[Path], tally: Tally) -> Iterator[tuple[Path, str]]:
        for path in paths:
            rows = _pieces(path) if _is_text(path) else File.at(path).rows()
            for text in tally.use(str(path), rows, _document):
                yield path, text

    def training(self) -> Iterator[str]:
        """The documents that aren't held out."""
        return (text for text in self.read(Tally()) if not self.is_held_out(text))

    def is_held_out(self, text: str) -> bool:
        """Is the document in the validation set?"""
        if self._apart:
            return hash_of(text) in self._hashes_apart
        return is_held_out(text) or hash_of(text) == self._only_one

    @functools.cached_property
    def _hashes_apart(self) -> set[bytes]:
        return {hash_of(text) for _, text in self._in(self._apart, Tally())}

    @functools.cached_property
    def _only_one(self) -> bytes | None:
        """The hash of the document to hold out if there are so few that none is chosen by its hash."""
        hashes = set[bytes]()
        for text in self.read(Tally()):
            if is_held_out(text):
                return None
            hashes.add(hash_of(text))
        return min(hashes) if len(hashes) > 1 else None


def _document(row: Row) -> str:
    text = row.text("text")
    if not text.strip():
        raise RowError(row.where, "'text' is empty")
    return text


def _is_text(path: Path) -> bool:
    return path.name.lower().removesuffix(".gz").endswith(".txt")


def _is_text_like_rows(path: Path) -> bool:
    """Is it a .txt file that would hold rows if it had another name?"""
    if not _is_text(path):
        return False
    head = files.head(path).removeprefix(codecs.BOM_UTF8).lstrip()
    return head.startswith((b"{", b"[")) or b"text" in re.split(rb"[,\t]", head.partition(b"\n")[0].rstrip())


def _pieces(path: Path) -> Iterator[Row]:
    """The documents of a .txt file."""
    line = 1
    for piece in cut_text(files.decode(str(path), files.read(path))):
        whole, mended = mend(piece)
        yield Row(f"{path}, line {line}", {"text": whole}, mended=mended)
        line += piece.count("\n")


def cut_text(text: str, cuts: Sequence[str] = CUTS) -> Iterator[str]:
    """Pieces of a text of at least `SHORTEST` characters, which join up to the whole text."""
    piece = ""
    for part in re.split(cuts[0], text):  # the text between cuts, and the cuts
        piece += part
        if len(piece) >= SHORTEST and re.fullmatch(cuts[0], part):
            yield from _shorter(piece, cuts[1:])
            piece = ""
    if piece.strip():
        yield from _shorter(piece, cuts[1:])


def _shorter(piece: str, cuts: Sequence[str]) -> Iterator[str]:
    return cut_text(piece, cuts) if cuts and len(piece) > LONGEST else iter([piece])


class Corpus:
    """Sequences of all the documents, in a different order in every epoch.

    Args:
        documents: to read, unless the cache has their tokens.
        tokenise: turns texts into ids.
        fingerprint: identifies what `tokenise` does.
        end: the end-of-text token.
        length: tokens per sequence.
        seed: for the order.

    Raises:
        ValueError: either side of the split has less than one sequence; or as for `Documents`.
    """

    def __init__(self, documents: Documents, tokenise: Tokenise, fingerprint: str, *, end: int, length: int, seed: int):
        self.length, self.seed = length, seed
        cuts = f"{HELD_OUT} {SHORTEST} {LONGEST}"
        key = cache.digest("corpus, 4", documents.sha256, documents.name, fingerprint, str(end), cuts)

        def make() -> cache.Arrays:
            made = _tokenise(documents, tokenise, end)
            documents.check_unchanged()  # or the cache would keep other documents under this key
            return made

        made = cache.arrays(key, 4, make)
        self.tokens, self.starts, self.validation_tokens, notes = made
        self.notes: list[str] = json.loads(notes.tobytes())
        self.train_size = len(self.tokens) // length  # sequences per epoch
        for side, tokens in (("training", self.tokens), ("validation", self.validation_tokens)):
            if len(tokens) < length:
                raise ValueError(
                    f"the {side} documents have {len(tokens):,} tokens, less than one sequence of {length:,}: "
                    f"give more documents (one in {HELD_OUT} is held out; empty lines separate those of a .txt file) "
                    "or a shorter --sequence-length" + "".join(f"; {note}" for note in self.notes)
                )

    def sequence(self, index: int) -> np.ndarray:
        """Sequence `index` in an endless series of epochs, (length,) int64."""
        epoch, place = divmod(index, self.train_size)
        order, ends = _order(self, epoch)
        start, stop = place * self.length, (place + 1) * self.length
        parts = []
        for number in range(int(np.searchsorted(ends, start, "right")), int(np.searchsorted(ends, stop, "left")) + 1):
            document = order[number]
            first = int(self.starts[document])
            begin = ends[number] - (self.starts[document + 1] - first)  # of the document within the epoch
            parts.append(self.tokens[first + max(0, start - begin) : first + min(ends[number], stop) - begin])
        return np.concatenate(parts).astype(np.int64)

    def validation(self, tokens: int) -> np.ndarray:
        """Held-out sequences, at most `tokens` tokens but at least one sequence: (sequences, length) int64."""
        return cut(self.validation_tokens[: max(tokens, self.length)], self.length)


@functools.lru_cache(maxsize=2)
def _order(corpus: Corpus, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """An epoch's documents, and where each of them ends among the epoch's tokens."""
    order = np.random.default_rng((corpus.seed, epoch)).permutation(len(corpus.starts) - 1)
    return order, np.cumsum(np.diff(corpus.starts)[order])


def cut(tokens: np.ndarray, length: int) -> np.ndarray:
    """Consecutive tokens as (sequences, length) int64; the remainder is dropped."""
    count = len(tokens) // length
    return np.asarray(tokens[: count * length], dtype=np.int64).reshape(count, length)


def _tokenise(documents: Documents, tokenise: Tokenise, end: int) -> cache.Arrays:
    """Ids of the training documents, where each begins, ids of the held-out ones, notes on the data as JSON bytes.

    The held-out ones are ordered by hash, so that the first ones are a sample of all.
    """
    training: list[np.ndarray] = []
    held_out: list[tuple[bytes, np.ndarray]] = []
    tally = Tally()
    texts = documents.read(tally)
    while some := list(islice(texts, BATCH)):
        for text, ids in zip(some, tokenise(some), strict=True):
            tokens = np.array([*ids, end], dtype=np.int32)
            if documents.is_held_out(text):
                held_out.append((hash_of(text), tokens))
            else:
                training.append(tokens)
    held_out.sort(key=lambda pair: pair[0])
    starts = np.cumsum([0, *map(len, training)])
    nothing = np.zeros(0, dtype=np.int32)
    validation = np.concatenate([nothing, *(tokens for _, tokens in held_out)])
    notes = np.frombuffer(json.dumps(tally.notes).encode(), dtype=np.uint8)
    return np.concatenate([nothing, *training]), starts, validation, notes
