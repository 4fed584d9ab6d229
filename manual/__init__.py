"""The documentation's generated pages: `python -m manual` writes them, and a test fails when they are stale."""
