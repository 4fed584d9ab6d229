"""All randomness of a run is a function of its seed and step: so runs compare, resume, and are alike on all ranks."""

import random
import zlib
from contextlib import AbstractContextManager

import numpy as np
import torch


def seed_generators(*key: int | str) -> None:
    """Seed the global generators of torch, numpy and Python, from which a user's own task may draw."""
    seed = zlib.crc32("/".join(map(str, key)).encode())  # numpy's takes 32 bits
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def random_state_kept(device: torch.device) -> AbstractContextManager[None]:
    """Within this context torch's generators, of the CPU and of `device`, may be used: they will be as they were."""
    return torch.random.fork_rng([device.index or 0] if device.type == "cuda" else [])
