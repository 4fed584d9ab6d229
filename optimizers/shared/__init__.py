"""What several methods share, as free functions."""
