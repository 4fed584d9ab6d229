"""Data sets from the hub, at a pinned revision, with a one-sentence error if they can't be loaded."""

from typing import Any


def load(repository: str, config: str | None, *, split: str, revision: str | None, way_out: str, **given: Any) -> Any:
    """A split as loaded by `datasets.load_dataset`; `given` are further arguments of it.

    Raises:
        ValueError: it can't be reached or read; `way_out` says what --data takes instead.
    """
    import datasets  # takes seconds

    try:
        return datasets.load_dataset(repository, config, split=split, revision=revision, **given)
    except Exception as error:  # a network, a cache, a file: each fails in its own way
        name = f"{repository} ({config})" if config else repository
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"can't load {name} from the hub: {reason}; --data also takes {way_out}") from error
