"""Preference tuning of causal language models by DPO (Rafailov et al., NeurIPS 2023, arXiv 2305.18290).

`demo` asks about Python's standard library; a `.json` or `.jsonl` file (or a folder of them) holds your own pairs, in
any format of `formats.py`; short names (ultrafeedback, hh-rlhf, orca-dpo) stand for data sets on the hub.

The reference is the model that the run starts from as its method holds it: with a quantised base if it has one, and
with adapters, which change nothing yet. Its log-probabilities are computed once before the first step and kept with the
pairs, so there is never a second model. As in the authors' code the model has no dropout, in neither pass; that of
adapters is a hyper-parameter of the method, and works in training alone.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from tasks.base import Kind
from tasks.data.order import batch_positions
from tasks.dpo import pairs
from tasks.dpo.examples import Pairs
from tasks.dpo.formats import Pair
from tasks.instruct import templates
from tasks.instruct.prompts import alpaca
from tasks.models.arguments import TaskArguments
from tasks.models.batches import padded
from tasks.models.language import EVALUATION_TOKENS, LanguageModel
from tasks.models.preference import Preference

NAME = "dpo"


def names() -> tuple[str, ...]:
    """The family is a single task."""
    return ("",)


def available_in(data: str) -> tuple[str, ...]:
    """Its task, from any source. Raises ValueError for an unknown one."""
    pairs.check_source(data)
    return names()


def create(
    name: str,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss: str = "sigmoid",
    validation_examples: int = 200,
    **given: Any,
) -> "PreferenceTuning":
    """Build it; see `tasks.create`.

    Args:
        name: "".
        beta, label_smoothing: see `Preference`.
        loss: "sigmoid" or "ipo", see `Preference`.
        validation_examples: the most held-out pairs to score on.
        given: as for `tasks.create`.
    """
    return PreferenceTuning(TaskArguments(**given), Preference(beta, label_smoothing, loss), validation_examples)


class PreferenceTuning:
    """Chosen and rejected answers go through the model as one batch. See `tasks.Task` for the interface."""

    name, headline, higher_is_better = NAME, "accuracy", True
    kind: Kind = "preference"
    constant_score = 0.5  # of a model that finds no answer likelier than its reference does

    def __init__(self, given: TaskArguments, preference: Preference, validation_examples: int):
        if validation_examples < 1:
            raise ValueError("the option validation_examples must be at least 1")
        self.batch_size, self.seed, self.preference = given.batch_size, given.seed, preference
        read = pairs.read(given.data)
        self.language = LanguageModel(
            given, texts=lambda: _texts(read.training), data_sha256=f"dpo {read.sha256}", dropout=False
        )
        self.from_scratch, self.tokenizer = self.language.from_scratch, self.language.tokenizer
        # as in a step, at most
        self._most_tokens = min(EVALUATION_TOKENS, 2 * given.batch_size * given.sequence_length)
        source = f"{given.data} {read.sha256}"
        self.train = self._fit(read.training, given.sequence_length, "training", source)
        self.validation = self._fit(read.held_out[:validation_examples], given.sequence_length, "held-out", source)
        self.train_size, self.validation_size = len(self.train), len(self.validation)
        self._of_data = {"data": given.data, "data_revision": read.revision, "data_sha256": read.sha256}
        self._notes = [*read.notes, *templates.notes(self.tokenizer), *self.train.notes, *self.validation.notes]

    def _fit(self, some: list[Pair], length: int, side: str, source: str) -> Pairs:
        return Pairs(some, self.language, length, side, source=source, most_tokens=self._most_tokens)

    def lengths(self) -> list[int]:
        """See `tasks.HasLengths`."""
        return self.train.lengths.tolist()

    @property
    def identity(self) -> dict[str, str | None]:
        """See `tasks.HasIdentity`."""
        return self.language.identity(self._of_data)

    @functools.cached_property
    def provenance(self) -> dict[str, str | None]:
        """See `tasks.Task.provenance`."""
        return self.language.provenance(self._of_data, self._notes, self.train.answers.tokens)

    @property
    def head(self) -> tuple[str, ...]:
        """See `tasks.Task.head`."""
        return self.language.head

    def build_model(self) -> nn.Module:
        """A new model on the CPU; the same for the same model and seed."""
        return templates.stopping(self.tokenizer, self.language.build_model())

    def remember_training(self, model: nn.Module, batches: int) -> None:
        """See `tasks.HasReference`."""
        count = min(batches * self.batch_size, self.train_size)  # an epoch has them all
        self.train.remember(model, batch_positions(self.seed, 0, count, self.train_size))

    def remember_held_out(self, model: nn.Module) -> None:
        """See `tasks.HasReference`."""
        self.validation.remember(model, range(self.validation_size))

    def batch(self, step: int) -> dict[str, Tensor]:
        """The training batch of a step; each epoch is shuffled separately; see `Preference.loss` for what it holds.

        Raises:
            RuntimeError: the reference hasn't seen its pairs.
        """
        return self.train.batch(batch_positions(self.seed, step, self.batch_size, self.train_size))

    def largest_batch(self) -> dict[str, Tensor]:
        """See `tasks.HasLargestBatch`: all batches have the same shape, and any reference as many bytes."""
        batch = self.train.full_batch(self.batch_size)
        return padded(batch) if (self.train.lengths < self.train.length).any() else batch

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The mean over pairs, a scalar: see `Preference.loss`."""
        return self.preference.loss(model, batch)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """On held-out pairs: `accuracy`, `loss` and `reward_margin`.

        The accuracy is the share of pairs whose chosen answer has the higher implicit reward; equal ones count half, so
        the reference itself has .5. The margin is the mean difference of the rewards.
        """
        log_ratios = self.validation.log_ratios(model)
        margins = self.preference.reward_margins(log_ratios)
        right = (margins > 0).float() + (margins == 0).float() / 2
        losses = self.preference.losses(log_ratios, self.validation.tokens)
        return {
            "accuracy": right.mean().item(),
            "loss": losses.mean().item(),
            "reward_margin": margins.mean().item(),
        }

    def state_dict(self) -> dict[str, Any]:
        """What the reference said: a run that goes on has no such model any more."""
        return {"training": self.train.reference, "held_out": self.validation.reference}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with that."""
        self.train.reference, self.validation.reference = state["training"], state["held_out"]


def _texts(some: Iterable[Pair]) -> Iterator[str]:
    return ("".join(text for text, _ in alpaca(one)) for pair in some for one in (pair.chosen, pair.rejected))
