"""SuperGLUE (Wang et al., 2019, arXiv 1905.00537): eight tasks, one row of `ROWS` each."""

from tasks.superglue.rows import NAME, available_in, create, names

__all__ = ["NAME", "available_in", "create", "names"]
