"""Pretraining on text, as on C4 (Raffel et al., 2020, arXiv 1910.10683)."""
