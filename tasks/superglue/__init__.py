"""SuperGLUE's eight tasks (Wang et al., 2019, arXiv 1905.00537)."""
