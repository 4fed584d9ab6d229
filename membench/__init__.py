"""membench: measure what memory-efficient training methods need, how fast they are and how well they learn."""

__version__ = "0.1.0"
