"""Sequences from streamed documents, in an order that can be resumed at the exact token.

Documents are read in blocks, each shuffled by (seed, block). So a reader's state is where its block begins
(`datasets`' IterableDataset.state_dict) and the few tokens left over from the previous block. No document is repeated
or left out, unlike with the shuffle buffer of `datasets`, which is lost at a checkpoint.
"""

from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Any, Protocol

import numpy as np

from tasks.c4.corpus import Tokenise, cut

BLOCK = 1024  # documents shuffled together


class Reader(Protocol):
    """A `datasets.IterableDataset` of rows with a field `text`."""

    def __iter__(self) -> Any: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Stream:
    """Endless sequences from a stream, which starts again when it ends.

    Args:
        open: opens the stream at its beginning.
        tokenise: turns texts into ids.
        skip: is true of documents to leave out (held-out ones).
        end: the end-of-text token.
        length: tokens per sequence.
        seed: for the order.
    """

    def __init__(
        self,
        open: Callable[[], Reader],
        tokenise: Tokenise,
        *,
        skip: Callable[[str], bool],
        end: int,
        length: int,
        seed: int,
    ):
        self._open, self._tokenise, self._skip = open, tokenise, skip
        self._end, self._length, self._seed = end, length, seed
        self._begin()

    def sequence(self, index: int) -> np.ndarray:
        """Sequence `index`, (length,) int64. Going back, or far ahead, reads everything from the beginning."""
        if index < self._next:
            self._begin()
        while True:
            while not self._ready:
                self._read_block()
            sequence = self._ready.popleft()
            self._next += 1
            if self._next > index:
                return sequence

    def state_dict(self) -> dict[str, Any]:
        """The reader's position: plain data."""
        return {"block": self._start, "next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there: reads the block again."""
        self._begin()
        start = state["block"]
        if start is not None:
            self._reader.load_state_dict(start["reader"])
            self._rows = iter(self._reader)
            self._block, self._left = start["number"], list(start["left"])
            self._next = start["next"]
            self._read_block()
        while self._next < state["next"]:
            self._ready.popleft()
            self._next += 1

    def _begin(self) -> None:
        self._reader = self._open()
        self._rows = iter(self._reader)
        self._ready: deque[np.ndarray] = deque()
        self._next = self._block = 0  # numbers of the next sequence to return and the next block to read
        self._left = list[int]()  # tokens that didn't fill a sequence
        self._start: dict[str, Any] | None = None  # of the block read last
        self._found = False  # any document in this pass?

    def _read_block(self) -> None:
        """Read the next block into sequences; after the last block, start again."""
        self._start = {
            "reader": self._reader.state_dict(),
            "number": self._block,
            "left": list(self._left),
            "next": self._next,
        }
        texts = [text_of(row) for row in islice(self._rows, BLOCK)]
        if not texts:
            self._again()
            return
        order = np.random.default_rng((self._seed, self._block)).permutation(len(texts))
        chosen = [texts[number] for number in order if not self._skip(texts[number])]
        self._found = self._found or bool(chosen)
        tokens = [*self._left]
        for ids in self._tokenise(chosen):
            tokens += [*ids, self._end]
        whole = cut(np.array(tokens, dtype=np.int64), self._length)
        self._ready.extend(whole)
        self._left = tokens[whole.size :]
        self._block += 1

    def _again(self) -> None:
        if not self._found:
            raise ValueError("the stream has no documents to train on")
        self._found = False
        self._reader = self._open()
        self._rows = iter(self._reader)


def text_of(row: dict[str, Any]) -> str:
    """A row's document. Raises ValueError if it has none."""
    text = row.get("text")
    if not isinstance(text, str):
        raise ValueError(f"a document of the stream has no field 'text', only {', '.join(row)}")
    return text
