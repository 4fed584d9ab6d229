"""From settings to records: what is missing is made, each run in a process of its own."""
