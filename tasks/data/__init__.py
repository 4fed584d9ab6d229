"""Reading data: files, rows, order, what is held out, and the cache."""
