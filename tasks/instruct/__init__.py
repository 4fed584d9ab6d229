"""Instruction tuning on conversations."""
