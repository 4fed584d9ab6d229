"""Documents, tokenised, joined with an end-of-text token and cut into sequences of one length.

A `Corpus` has all of its documents: sequence number i is a function of (seed, i). A `Stream` reads them as they come.
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from tasks.data import cache, files, stdlib_docs
from tasks.data.held_out import HELD_OUT, hash_of, is_held_out

SUFFIXES = (*files.JSON, ".txt")
SHORTEST = 2000  # characters of a .txt file's documents; only the last may be shorter
BATCH = 1024  # documents that are tokenised together

Tokenise = Callable[[Sequence[str]], list[list[int]]]


class Documents:
    """All documents of the demo, or of a file or folder.

    Args:
        data: "demo", a file or a folder: `.jsonl` (also `.json`, packed with gzip) with a field `text`, or `.txt`,
            which is cut at empty lines into documents of 2,000 characters or more.

    Raises:
        ValueError: there is no such file.
    """

    def __init__(self, data: str):
        self._paths = [] if data == "demo" else files.find(data, SUFFIXES, "'demo' nor 'hub'")
        self.sha256 = files.sha256(self._paths) if self._paths else hash_of("\0".join(stdlib_docs.documents())).hex()

    def __iter__(self) -> Iterator[str]:
        """Raises ValueError at the first line that is wrong, or that has no `text`."""
        if not self._paths:
            yield from stdlib_docs.documents()
        for path in self._paths:
            yield from _pieces(path) if path.suffix == ".txt" else (row.text("text") for row in files.rows(path))

    def training(self) -> Iterator[str]:
        """Those that aren't held out."""
        return (text for text in self if not is_held_out(text))


def _pieces(path: Path) -> Iterator[str]:
    piece = ""
    for part in re.split(r"((?<=\n)[ \t]*\r?\n)", files.text(path)):  # paragraphs, and the empty lines between
        piece += part
        if len(piece) >= SHORTEST and not part.strip():
            yield piece
            piece = ""
    if piece.strip():
        yield piece


class Corpus:
    """Sequences of all the documents, in an order of its own in every epoch.

    Args:
        documents: to read, unless the cache has their tokens.
        tokenise: texts to ids.
        fingerprint: names what `tokenise` does.
        end: the end-of-text token.
        length: tokens of a sequence.
        seed: of the order.

    Raises:
        ValueError: either side of the split has less than one sequence; or as `Documents`.
    """

    def __init__(self, documents: Documents, tokenise: Tokenise, fingerprint: str, *, end: int, length: int, seed: int):
        self.length, self.seed = length, seed
        key = cache.digest("corpus, 2", documents.sha256, fingerprint, str(end), str(HELD_OUT), str(SHORTEST))
        made = cache.arrays(key, 4, lambda: _tokenise(documents, tokenise, end))
        self.tokens, self.starts, self.validation_tokens, (self.empty,) = made
        self.train_size = len(self.tokens) // length  # sequences an epoch
        for side, tokens in (("training", self.tokens), ("validation", self.validation_tokens)):
            if len(tokens) < length:
                raise ValueError(
                    f"the {side} documents have {len(tokens):,} tokens, less than one sequence of {length:,}: "
                    f"give more documents (one of {HELD_OUT} is held out; empty lines part those of a .txt file) or a "
                    "shorter --sequence-length"
                )

    @property
    def notes(self) -> list[str]:
        return [f"{self.empty:,} empty documents left out"] if self.empty else []

    def sequence(self, index: int) -> np.ndarray:
        """Sequence number `index` of endless epochs, (length,) int64."""
        epoch, place = divmod(index, self.train_size)
        order, ends = _order(self, epoch)
        start, stop = place * self.length, (place + 1) * self.length
        parts = []
        for number in range(int(np.searchsorted(ends, start, "right")), int(np.searchsorted(ends, stop, "left")) + 1):
            document = order[number]
            first = int(self.starts[document])
            begin = ends[number] - (self.starts[document + 1] - first)  # of the document in the epoch
            parts.append(self.tokens[first + max(0, start - begin) : first + min(ends[number], stop) - begin])
        return np.concatenate(parts).astype(np.int64)

    def validation(self, tokens: int) -> np.ndarray:
        """Held-out sequences, at most `tokens` tokens and at least one: (sequences, length) int64."""
        return cut(self.validation_tokens[: max(tokens, self.length)], self.length)


@functools.lru_cache(maxsize=2)
def _order(corpus: Corpus, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """An epoch's documents, and where each ends among its tokens."""
    order = np.random.default_rng((corpus.seed, epoch)).permutation(len(corpus.starts) - 1)
    return order, np.cumsum(np.diff(corpus.starts)[order])


def cut(tokens: np.ndarray, length: int) -> np.ndarray:
    """Tokens one after the other as (sequences, length) int64; what is left at the end is dropped."""
    count = len(tokens) // length
    return np.asarray(tokens[: count * length], dtype=np.int64).reshape(count, length)


def _tokenise(documents: Iterable[str], tokenise: Tokenise, end: int) -> cache.Arrays:
    """Ids of the training documents, where each begins, ids of the held-out ones, the number of empty ones.

    The held-out ones are in the order of their hashes: the first of them are a sample of all.
    """
    training: list[np.ndarray] = []
    held_out: list[tuple[bytes, np.ndarray]] = []
    empty, texts = 0, iter(documents)
    while some := list(islice(texts, BATCH)):
        full = [text for text in some if text.strip()]
        empty += len(some) - len(full)
        for text, ids in zip(full, tokenise(full), strict=True):
            tokens = np.array([*ids, end], dtype=np.int32)
            if is_held_out(text):
                held_out.append((hash_of(text), tokens))
            else:
                training.append(tokens)
    held_out.sort(key=lambda pair: pair[0])
    starts = np.cumsum([0, *map(len, training)])
    nothing = np.zeros(0, dtype=np.int32)
    validation = np.concatenate([nothing, *(tokens for _, tokens in held_out)])
    return np.concatenate([nothing, *training]), starts, validation, np.array([empty])
