"""Arguments shared by every task family."""

from dataclasses import dataclass

from tasks.models.source import DTYPES


@dataclass(frozen=True, kw_only=True)
class TaskArguments:
    """The arguments of `tasks.create` that don't depend on the family.

    Attributes:
        model: `config:NAME` (random weights), a hub id (`ID` or `ID@REVISION`), or a folder.
        tokenizer: a hub id or a folder; by default the model's own.
        data: "demo", "hub" or a folder in the data set's official format.
        batch_size: examples per batch (a multiple-choice example is one sequence per choice).
        sequence_length: tokens per sequence; longer texts are cut, shorter ones padded.
        seed: for the random weights and the batches.
        dtype: of the weights, "float32", "bfloat16" or "float16".
        trust_remote_code: run code that comes with a model on the hub.

    Raises:
        ValueError: no task can work with one of the values.
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
            raise ValueError(f"seed must be at least 0, not {self.seed}")
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}: use {', '.join(DTYPES)}")
