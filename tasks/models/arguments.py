"""What every task is built from."""

from dataclasses import dataclass

from tasks.models.source import DTYPES


@dataclass(frozen=True, kw_only=True)
class TaskArguments:
    """The arguments of `tasks.create` that don't depend on the family.

    Raises:
        ValueError: a value that no task can work with.
    """

    model: str
    tokenizer: str | None
    data: str
    batch_size: int
    sequence_length: int
    seed: int
    dtype: str
    trust_remote_code: bool

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, but it is {self.seed}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is unknown: there are {', '.join(DTYPES)}")
