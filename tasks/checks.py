"""What every task refuses."""

from .models import DTYPES


def check_given(*, batch_size: int, seed: int, dtype: str) -> None:
    """Raises ValueError for a value that no task can work with."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, but it is {seed}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown: there are {', '.join(DTYPES)}")
