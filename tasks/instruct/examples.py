"""Tokenised examples of limited length, and batches of them: padded, or packed without attention across examples."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tasks.data import cache
from tasks.data.tally import Tally
from tasks.instruct.prompts import Encoded
from tasks.models.language import IGNORED, Batch


@dataclass(frozen=True)
class Examples:
    """Examples that fit, concatenated.

    Attributes:
        tokens, answers: of all examples, (tokens,).
        starts: where each begins, and the end, (examples + 1,).
        kept: each example's number among all that were given; prompts that leave no room for an answer are dropped.
        cut: how many answers lost their end.
        unfit: how many prompts left no room.
        notes: what a reader of the results must know about how they were made.
    """

    tokens: np.ndarray
    answers: np.ndarray
    starts: np.ndarray
    kept: np.ndarray
    cut: int
    unfit: int
    notes: list[str]

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> Encoded:
        place = slice(int(self.starts[index]), int(self.starts[index + 1]))
        return self.tokens[place], self.answers[place]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, (examples,)."""
        return np.diff(self.starts)


def fit(key: str, encode: Callable[[Tally], Iterable[Encoded | None]], length: int) -> Examples:
    """Cut examples to `length` tokens; cached under `key`, which identifies `encode` and `length`."""
    tokens, answers, starts, kept, (cut, unfit), notes = cache.arrays(key, 6, lambda: _fit(encode, length))
    return Examples(tokens, answers, starts, kept, int(cut), int(unfit), json.loads(notes.tobytes()))


def _fit(encode: Callable[[Tally], Iterable[Encoded | None]], length: int) -> cache.Arrays:
    tokens, answers, kept, tally = [np.zeros(0, np.int32)], [np.zeros(0, bool)], list[int](), Tally()
    cut = unfit = 0
    for number, one in enumerate(encode(tally)):
        if one is None:
            continue
        ids, is_answer = one
        if not is_answer[:length].any():
            unfit += 1
            continue
        tokens.append(ids[:length])
        answers.append(is_answer[:length])
        kept.append(number)
        cut += bool(is_answer[length:].any())
    starts = np.cumsum([0, *map(len, tokens[1:])])
    notes = np.frombuffer(json.dumps(tally.notes).encode(), dtype=np.uint8)
    counts = np.array([cut, unfit])
    return np.concatenate(tokens), np.concatenate(answers), starts, np.array(kept, dtype=np.int64), counts, notes


def pack(lengths: Sequence[int] | np.ndarray, length: int) -> list[list[int]]:
    """Pack example numbers into few groups of at most `length` tokens: the longest first, each where it fits best."""
    room: list[list[list[int]]] = [[] for _ in range(length + 1)]  # groups by how many tokens they have left
    groups: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        size = int(lengths[number])
        left = next((left for left in range(size, length + 1) if room[left]), length)
        if not room[left]:
            groups.append([])
            room[left].append(groups[-1])
        group = room[left].pop()
        group.append(number)
        room[left - size].append(group)
    return groups


def collate(rows: Sequence[Sequence[Encoded]], length: int, pad: int, *, packed: bool) -> Batch:
    """A batch with one or more examples per row, each (rows, length) int64.

    `input_ids` padded on the right, `attention_mask` 0 on the padding, `labels` on answers only, and for `packed`
    examples `position_ids` that start again at 0 with each example (and with the padding).
    """
    shape = (len(rows), length)
    ids, mask = np.full(shape, pad, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    labels, positions = np.full(shape, IGNORED, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for row, examples in enumerate(rows):
        start = 0
        for tokens, answers in examples:
            place = slice(start, start + len(tokens))
            ids[row, place], mask[row, place] = tokens, 1
            labels[row, place] = np.where(answers, tokens, IGNORED)
            positions[row, place] = np.arange(len(tokens))
            start = place.stop
        positions[row, start:] = np.arange(length - start)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {
        key: torch.from_numpy(one) for key, one in (batch | ({"position_ids": positions} if packed else {})).items()
    }
