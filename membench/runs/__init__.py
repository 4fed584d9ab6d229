"""From settings to records: missing runs are made, each in its own process."""
