"""Classification of your own texts: one task."""

from tasks.classify.task import NAME, available_in, create, names

__all__ = ["NAME", "available_in", "create", "names"]
