"""Does every method keep its promises (`optimizers.contract`) on the device, too? Saving, resuming, finishing."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor

import optimizers
from benchmarks.on_gpu.card import Card
from benchmarks.on_gpu.journal import is_spoilt
from optimizers import contract
from tasks.models.damage import is_out_of_memory

ELSEWHERE = ("runs_on_fake_tensors",)  # its tensors are made on the CPU


def check(card: Card, method: str) -> dict[str, Any]:
    """Run the checks with model and data on the card.

    Returns:
        checks: how many there are.
        broken: {check: what it says}, for those that failed.
    """
    build, batch = contract.build_model, contract.batch

    def on_card(step: int) -> tuple[Tensor, Tensor]:
        tokens, labels = batch(step)
        return tokens.to(card.device), labels.to(card.device)

    def built(dtype: torch.dtype = torch.float32) -> contract.TinyTransformer:
        return build(dtype).to(card.device)

    chosen = [one for one in contract.CHECKS if one.__name__ not in ELSEWHERE]
    subject = contract.Subject(optimizers.get(method), optimizers.get(method).example)
    broken = {}
    with mock.patch.multiple(contract, build_model=built, batch=on_card):
        for one in chosen:
            try:
                one(subject)
            except Exception as error:
                if is_out_of_memory(error) or is_spoilt(str(error)):  # the card's, and of what follows
                    raise
                broken[one.__name__] = f"{type(error).__name__}: {error}"[:500]
    return {"checks": len(chosen), "broken": broken}
