"""The memory behind a tensor."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def storages_of(t: Tensor) -> Iterator[torch.UntypedStorage]:
    """The memory of `t`; for a DTensor, whose own storage appears to have the global size, that of its local part."""
    if is_traceable_wrapper_subclass(t):
        for inner in (getattr(t, name) for name in t.__tensor_flatten__()[0]):
            if torch.is_tensor(inner):
                yield from storages_of(inner)
    else:
        yield t.untyped_storage()
