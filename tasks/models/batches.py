"""The batches that need the most memory."""

from torch import Tensor


def padded(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with at least one position masked: transformers drops a mask of all ones, which saves memory."""
    mask = batch["attention_mask"].clone()
    mask.view(-1, mask.shape[-1])[0, -1] = 0
    return {**batch, "attention_mask": mask if batch["attention_mask"].all() else batch["attention_mask"]}
