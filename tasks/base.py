"""What a task is, and the families of tasks by name."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from torch import Tensor, nn

from tasks.names import suggestion


class Task(Protocol):
    """A model, batches, a loss and a score."""

    name: str  # "superglue/rte"
    headline: str  # the metric by which tables rank
    higher_is_better: bool
    from_scratch: bool  # random weights, so every method trains embeddings, norms and head

    @property
    def train_size(self) -> int:
        """Number of training examples, to convert epochs to steps."""

    @property
    def head(self) -> tuple[str, ...]:
        """Name patterns of the parameters that aren't from a checkpoint: every method trains them."""

    @property
    def provenance(self) -> Mapping[str, str | None]:
        """Data, model and tokenizer, and under "notes" what a reader of the results must know; for the record."""

    def build_model(self) -> nn.Module:
        """A new model on the CPU; the same for the same model and seed."""

    def batch(self, step: int) -> dict[str, Tensor]:
        """The training batch of a step, on the CPU: a function of (seed, step), so resuming needs no reader state.

        Tensors with a row for each example, `attention_mask` among them, by which tokens are counted.
        """

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The loss to minimise, a scalar: the mean over labels that aren't -100 or, without labels, over rows.

        By these a batch is divided among micro-batches and processes: of a sum, each would have a part.
        """

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """All metrics on the validation set, on the model's own device; `headline` is one of the keys."""


WANTED = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}  # of an option, by type

Kind = Literal["classification", "language", "preference"]


@runtime_checkable
class HasKind(Protocol):
    """A task that declares its kind, which decides the default learning rates."""

    kind: Kind


def kind(task: Task) -> Kind:
    """The kind of a task: as it declares, or else by whether its model is a causal language model of transformers.

    Raises:
        ValueError: it declares an unknown kind.
    """
    if isinstance(task, HasKind):
        if task.kind not in get_args(Kind):
            known = ", ".join(get_args(Kind))
            raise ValueError(f"task {task.name!r}: its kind must be one of {known}, not {task.kind!r}")
        return task.kind
    return "language" if is_language_model(task.build_model()) else "classification"


def is_language_model(model: nn.Module) -> bool:
    """Is it a causal language model of transformers, or of a class derived from one, as FSDP makes of any model's?"""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    return any(cls.__name__ in CAUSAL.values() for cls in type(model).__mro__)


@runtime_checkable
class HasValidation(Protocol):
    """A task that says what its headline is worth: on how few examples it is taken, and what takes no learning."""

    @property
    def validation_size(self) -> int:
        """Examples that the headline is a mean over; of those that are judged in groups, groups."""

    @property
    def constant_score(self) -> float | None:
        """The headline of guessing: of the best answer that is always the same, or of tokens that are all as likely.

        None where nobody can say.
        """


@runtime_checkable
class HasIdentity(Protocol):
    """A task that says at once what it has read: before a run is made, that is held against what it was named after."""

    @property
    def identity(self) -> Mapping[str, str | None]:
        """Of its provenance, what makes another run once it is changed: data, model and tokenizer."""


@runtime_checkable
class HasLargestBatch(Protocol):
    """A task that knows which of its training batches needs most memory; for others, a few batches are inspected."""

    def largest_batch(self) -> dict[str, Tensor]:
        """Full sequences, with padding if any training batch may have some. Memory is metered on this batch."""


@runtime_checkable
class HasLengths(Protocol):
    """A task of separate texts, which are padded: of others, sequences are full whatever their length."""

    def lengths(self) -> Sequence[int]:
        """Tokens of training texts (some of them), at most those of a sequence."""


@runtime_checkable
class HasReference(Protocol):
    """A task whose loss and scores compare the model with what it was before training.

    Both methods are called before the first step and the first evaluation, with the model as its method holds it.
    """

    def remember_training(self, model: nn.Module, batches: int) -> None:
        """Keep what `model` says of the examples in the first `batches` batches; under autocast as in training."""

    def remember_held_out(self, model: nn.Module) -> None:
        """Keep what it says of the held-out examples; without autocast, as in evaluation."""


@runtime_checkable
class ComparesScores(Protocol):
    """A task that tells, example by example, how sure it is of what training changed.

    `metrics.loss_change_standard_error` is the standard error of the loss's difference from that before training.
    """

    def remember_scores(self) -> None:
        """The last evaluation was of the model before training."""


@runtime_checkable
class HasReader(Protocol):
    """A task with something to keep for resuming: how far streamed data were read, or what was scored before training.

    Its `batch` remains a function of (seed, step), and for a task with a reference of that.
    """

    def state_dict(self) -> dict[str, Any]:
        """Plain data and tensors, part of a checkpoint."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there."""


class Family(Protocol):
    """Tasks that share a source of data and a way of scoring, in one module of this package.

    A family with a single task has one name, "": its task has the family's name.
    """

    @property
    def NAME(self) -> str:
        """The family's name: "superglue"."""

    def names(self) -> tuple[str, ...]:
        """Its tasks, without the family's name: ("boolq", "cb", ...); ("",) if it is a single task."""

    def available_in(self, data: str) -> tuple[str, ...]:
        """The `names` that a source of data has. Raises ValueError for an unknown source."""

    def create(self, name: str, **given: Any) -> Task:
        """Build one of its tasks. Further keywords with defaults are options of the family: packing=False."""


def available(families: Sequence[Family]) -> list[str]:
    """All tasks: ["superglue/boolq", ..., "c4"]."""
    return [_full_name(family, name) for family in families for name in family.names()]


def _full_name(family: Family, name: str) -> str:
    return f"{family.NAME}/{name}" if name else family.NAME


def expand(families: Sequence[Family], pattern: str, data: str) -> list[str]:
    """The tasks that the name of a family or task stands for."""
    by_name = {family.NAME: family for family in families}
    if pattern in by_name:
        return [_full_name(by_name[pattern], name) for name in by_name[pattern].available_in(data)]
    check_name(families, pattern)
    return [pattern]


def check_name(families: Sequence[Family], name: str) -> Family:
    """The family of a task. Raises ValueError with a suggestion when there is no such task."""
    known = available(families)
    if name in known:
        return next(family for family in families if name.partition("/")[0] == family.NAME)
    names = list(dict.fromkeys([*known, *(family.NAME for family in families)]))
    called = {one.rpartition("/")[2]: one for one in reversed(names)} | {one: one for one in names}
    raise ValueError(f"unknown task {name!r}. {suggestion(name, names, called)}")


def options(family: Family, given: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a family: its defaults, overridden by those `given`.

    Raises:
        ValueError: it has no such option, or the value doesn't have the default's type.
    """
    parameters = inspect.signature(family.create).parameters.values()
    known = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    given = dict(given)
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"{family.NAME} has no option {name!r}. {suggestion(name, known)}")
        if type(known[name]) is float and type(value) is int:
            given[name] = value = float(value)
        if type(value) is not type(known[name]):
            raise ValueError(f"{family.NAME}: the option {name} must be {WANTED[type(known[name])]}, not {value!r}")
    return {**known, **given}
