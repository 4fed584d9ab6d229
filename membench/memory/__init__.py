"""What a training step holds in memory, by part, to the byte."""
