"""What every task is built from."""

from dataclasses import dataclass

from tasks.models.source import DTYPES


@dataclass(frozen=True, kw_only=True)
class TaskArguments:
    """The arguments of `tasks.create` that don't depend on the family.

    Attributes:
        model: `config:NAME` (random weights), an id of the hub (`ID` or `ID@REVISION`), or a folder.
        tokenizer: an id of the hub or a folder; by default what belongs to the model.
        data: "demo", "hub" or a folder in the data set's official format.
        batch_size: examples a batch (an example of multiple choice is one sequence a choice).
        sequence_length: tokens of a sequence; longer texts are cut, shorter ones padded.
        seed: of the random weights and of the batches.
        dtype: of the weights, "float32", "bfloat16" or "float16".
        trust_remote_code: run code that comes with a model of the hub.

    Raises:
        ValueError: a value that no task can work with.
    """

    model: str
    tokenizer: str | None = None
    data: str = "demo"
    batch_size: int
    sequence_length: int
    seed: int = 0
    dtype: str = "float32"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, but it is {self.seed}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is unknown: there are {', '.join(DTYPES)}")
