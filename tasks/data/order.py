"""The order of training examples: epochs, each shuffled by (seed, epoch)."""

import functools

import numpy as np


def position(seed: int, index: int, count: int) -> int:
    """Which of `count` examples is at position `index` of an endless series of epochs."""
    epoch, place = divmod(index, count)
    return int(_shuffled(seed, epoch, count)[place])


def batch_positions(seed: int, step: int, batch_size: int, count: int) -> list[int]:
    """Which of `count` examples make up the batch of a step."""
    first = step * batch_size
    return [position(seed, index, count) for index in range(first, first + batch_size)]


@functools.lru_cache(maxsize=4)
def _shuffled(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)
