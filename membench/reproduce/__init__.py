"""Published tables as one command each: what a table needs, the runs that make it, ours beside the paper's."""
