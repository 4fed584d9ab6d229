"""Plans beside what a GPU's allocator says, times, races, the meter's overhead: random weights, bf16, no downloads.

Needs torch and transformers, and nothing else that isn't theirs; what is missing (peft, the peers) is left out.
"""
