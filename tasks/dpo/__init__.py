"""Preference tuning by DPO on pairs of answers: one task."""

from tasks.dpo.task import NAME, available_in, create, names

__all__ = ["NAME", "available_in", "create", "names"]
