"""Pretraining on text, by the protocol of C4 (Raffel et al., 2020, arXiv 1910.10683): one task."""

from tasks.c4.task import NAME, available_in, create, names

__all__ = ["NAME", "available_in", "create", "names"]
