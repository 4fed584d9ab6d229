"""Classification of the user's own texts: one task."""

from tasks.classify.task import NAME, available_in, create, names

__all__ = ["NAME", "available_in", "create", "names"]
