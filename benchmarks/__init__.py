"""Races against the packages that a user would pick instead: `python -m benchmarks.race`."""
