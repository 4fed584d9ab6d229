"""Instruction tuning on conversations: one task."""

from tasks.instruct.task import NAME, available_in, create, names

__all__ = ["NAME", "available_in", "create", "names"]
