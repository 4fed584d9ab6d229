"""Is a candidate worse than its baseline? Two sets of records in; verdicts, and an exit code, out."""
