"""All randomness of a run is a function of its seed and step: so runs compare, resume, and are alike on all ranks."""

import random
import zlib

import numpy as np
import torch


def seed_generators(*key: int | str) -> None:
    """Seed the global generators of torch, numpy and Python, from which a user's own task may draw."""
    seed = zlib.crc32("/".join(map(str, key)).encode())  # numpy's takes 32 bits
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
