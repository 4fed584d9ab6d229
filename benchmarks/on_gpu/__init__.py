"""Plans against what a GPU's allocator says, times, races, the meter's overhead: random weights, bf16, no downloads.

Needs only torch, transformers and their dependencies; what is missing (peft, the peers) is left out.
"""
