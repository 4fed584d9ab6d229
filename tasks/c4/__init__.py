"""Pretraining on text with C4's protocol (Raffel et al., 2020, arXiv 1910.10683): one task."""

from tasks.c4.task import NAME, available_in, create, names

__all__ = ["NAME", "available_in", "create", "names"]
