"""Tokenised pairs, batches of them, and what the reference says of each answer."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tasks.data import cache
from tasks.dpo.formats import Pair
from tasks.instruct.examples import Examples, collate, fit
from tasks.instruct.prompts import encode
from tasks.models.language import LanguageModel
from tasks.models.modes import evaluation
from tasks.models.preference import Batch, log_probabilities

UNKNOWN = torch.inf  # the reference's log-probability of an answer before it was asked for


class Pairs:
    """Pairs whose answers differ within a sequence's length.

    Args:
        pairs: as read.
        language: the model that gets them, with its tokenizer.
        length: tokens per sequence; longer ones are cut at the end.
        side: "training" or "held-out", for messages.
        source: identifies `pairs`.
        most_tokens: of a batch in a pass without gradients.

    Raises:
        ValueError: none is left.
    """

    def __init__(
        self, pairs: Sequence[Pair], language: LanguageModel, length: int, side: str, *, source: str, most_tokens: int
    ):
        self.given, self.side, self.length, self._pad = len(pairs), side, length, language.tokenizer.pad_token_id
        self._most_tokens = most_tokens
        key = cache.digest("pairs, 3", source, side, str(len(pairs)), language.fingerprint, str(length))
        both = [answer for pair in pairs for answer in (pair.chosen, pair.rejected)]
        self.answers: Examples = fit(key, lambda tally: encode(both, language.tokenizer, tally), length)
        whole = self._whole()
        asked = [pair for pair in whole if self._has_one_prompt(pair)]
        self.places = np.array([pair for pair in asked if not self._is_same(pair)], dtype=np.int64).reshape(-1, 2)
        self.apart, self.same = len(whole) - len(asked), len(asked) - len(self.places)
        if not len(self):
            raise ValueError(
                f"none of the {len(pairs):,} {side} pairs differs within sequence_length {length}"
                + "".join(f"; {note}" for note in self.notes)
            )
        self.reference = torch.full((len(self.answers),), UNKNOWN)  # log-probability of each answer

    def __len__(self) -> int:
        return len(self.places)

    def _whole(self) -> list[tuple[int, int]]:
        """The places of both answers of each pair of which both fit."""
        place = {int(number): place for place, number in enumerate(self.answers.kept)}
        numbers = ((2 * pair, 2 * pair + 1) for pair in range(self.given))
        return [(place[one], place[other]) for one, other in numbers if one in place and other in place]

    def _has_one_prompt(self, pair: tuple[int, int]) -> bool:
        """Do both answers follow the same tokens? Not if the chat template drops the answers at which they part."""
        chosen, rejected = (
            tokens[: int(is_answer.argmax())] for tokens, is_answer in map(self.answers.__getitem__, pair)
        )
        return np.array_equal(chosen, rejected)

    def _is_same(self, pair: tuple[int, int]) -> bool:
        (chosen, _), (rejected, _) = (self.answers[place] for place in pair)
        return np.array_equal(chosen, rejected)

    @property
    def notes(self) -> Iterator[str]:
        """What a reader of the results must know."""
        found = self.answers
        yield from (f"{self.side}: {note}" for note in found.notes)
        if found.cut:
            yield f"{found.cut:,} of {2 * self.given:,} {self.side} answers cut at the end to fit the sequence"
        if found.unfit:
            yield f"{found.unfit:,} {self.side} answers that don't begin within the sequence left out with their pairs"
        if self.apart:
            yield (
                f"{self.apart:,} {self.side} pairs left out, since the chat template doesn't put what is learned of "
                "both after the same prompt"
            )
        if self.same:
            yield f"{self.same:,} {self.side} pairs left out, since they are the same within the sequence"

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each answer with its prompt."""
        return self.answers.lengths[self.places.ravel()]

    def batch(self, pairs: Sequence[int]) -> Batch:
        """Pairs as `Preference.loss` takes them, a row each, (pairs, 2, length).

        Raises:
            RuntimeError: the reference hasn't seen them.
        """
        return self._paired(self.places[pairs], self._known(self.places[pairs]))

    def full_batch(self, count: int) -> Batch:
        """A batch of `count` pairs for metering: with a reference of zeros."""
        return self._paired(np.resize(self.places, (count, 2)), torch.zeros(count, 2))

    def _paired(self, places: np.ndarray, reference: Tensor) -> Batch:
        batch = self._collate(places.ravel(), self.length)
        return {**{key: value.view(-1, 2, self.length) for key, value in batch.items()}, "reference": reference}

    def remember(self, model: nn.Module, pairs: Iterable[int]) -> None:
        """Keep the log-probabilities that `model` gives the answers of these pairs now, in evaluation mode."""
        places = np.unique(self.places[list(pairs)])
        self.reference[torch.from_numpy(places)] = self._log_probabilities(model, places)

    def log_ratios(self, model: nn.Module) -> Tensor:
        """By how much `model` finds all answers likelier than the reference, (pairs, 2).

        Raises:
            RuntimeError: the reference hasn't seen them.
        """
        places, order = np.unique(self.places, return_inverse=True)  # in batches as when they were remembered
        log_ratios = self._log_probabilities(model, places) - self._known(places)
        return log_ratios[torch.from_numpy(order.reshape(-1, 2))]

    def _known(self, places: np.ndarray) -> Tensor:
        found = self.reference[places]
        if (found == UNKNOWN).any():
            raise RuntimeError(f"the reference hasn't seen these {self.side} pairs: let the task remember it first")
        return found

    @property
    def tokens(self) -> Tensor:
        """How many each answer has, (pairs, 2)."""
        return torch.tensor([[int(self.answers[place][1].sum()) for place in pair] for pair in self.places.tolist()])

    @torch.no_grad()
    def _log_probabilities(self, model: nn.Module, places: np.ndarray) -> Tensor:
        """Of the answers at `places`, on the CPU; those of similar length are in one batch."""
        device = next(model.parameters()).device
        lengths = self.answers.lengths[places]
        order, found = np.argsort(-lengths, kind="stable"), torch.empty(len(places))
        with evaluation(model):
            while len(order):
                length = int(lengths[order[0]])
                some, order = np.split(order, [max(1, self._most_tokens // length)])
                batch = {key: value.to(device) for key, value in self._collate(places[some], length).items()}
                found[some] = log_probabilities(model, batch).cpu()
        return found

    def _collate(self, places: Sequence[int] | np.ndarray, length: int) -> dict[str, Any]:
        batch = collate([[self.answers[int(place)]] for place in places], length, self._pad, packed=False)
        # not "labels", by whose number micro-batches would be weighted: this loss is a mean over pairs
        return {"targets" if key == "labels" else key: value for key, value in batch.items()}
