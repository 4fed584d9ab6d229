"""WeLore: low-rank factors where the singular values allow it (Jaiswal et al., ICML 2025, arXiv 2407.11239)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from optimizers.base import MemoryEfficientOptimizer, check_hyperparameters
from optimizers.registry import register
from optimizers.shared.adapters import frozen_linears
from optimizers.shared.arithmetic import adamw_update, expected_adam_state
from optimizers.shared.blocks import matching
from optimizers.shared.low_rank_linear import (
    factorize_linears,
    kept_ranks,
    low_rank_linears,
)
from optimizers.shared.reach import warn_of_idle
from optimizers.shared.stand_ins import dense_state_dict, restore_linears
from optimizers.shared.values import holds


@register("welore")
class WeLore(MemoryEfficientOptimizer):
    """WeLore: matrices of low rank are replaced by their factors, which AdamW trains; the others are frozen.

    The singular values of each linear module's matrix W (m, n) in the layers are scaled to 0..1, and those below one
    threshold tau are dropped. Where more than half of a matrix's values are dropped, k being left, W becomes
    U sqrt(S) (m, k) times sqrt(S) V^T (k, n): fewer weights than W had. Any other matrix stays whole, dense and frozen.
    The paper finds tau by search for a wished reduction of rank; here it is the quantile of all values pooled.

    The function changes at construction, by what is dropped: it is a compression of pretrained weights as well as a
    method of training. Biases are kept (the authors' code drops them), and frozen.

    Trains the factors, the norms, and `always_train`. Keeps 8 bytes per weight of these (12 with an fp32 master); the
    weights of a factorised matrix are k (m + n) in place of m n. Ranks depend on the weights, so a plan, which has
    none, takes those that need the most memory. Construction takes the singular values of each matrix.

    Args:
        model: the model to train, with its pretrained weights; its layers are in `nn.ModuleList`s.
        lr: learning rate.
        weight_decay: decoupled; for tensors of two or more dimensions, biases excepted, so for the factors.
        betas, eps: as in Adam.
        reduction: the share of all singular values that are dropped, or would be if every matrix lost them.
        always_train: name patterns of parameters to train directly.
        master_weights: fp32 moments and masters, if the model is in low precision.
        fp32_gradients: fp32 gradients for low-precision weights.

    Raises:
        ValueError: a value is out of range, a pattern matches nothing, the model has no linear modules in layers, or
            none of them loses more than half of its values.
    """

    summary = "AdamW on the factors of matrices with few large singular values; the other matrices are frozen"
    paper = "Jaiswal, Wang, Yin, Liu, Chen, Zhao, Grama, Tian & Wang, ICML 2025, arXiv 2407.11239"
    trains = "k (m + n) weights of the factors of each m x n matrix that loses over half its rank, and norms"
    keeps = "8 B per trained weight (12 B with an fp32 master); k (m + n) weights in place of m n"
    excludes = "weights outside linear modules (fused experts)"
    varies_with = "the ranks of its matrices"
    only_linear = True
    example = {"lr": 1e-2}
    adds_parameters = True

    def __init__(
        self,
        model: nn.Module,
        lr: float = 5e-5,
        weight_decay: float = 0.0,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        reduction: float = 0.5,
        always_train: tuple[str, ...] = (),
        master_weights: bool = True,
        fp32_gradients: bool = False,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        check_hyperparameters(defaults)  # every check comes before the model is changed
        if not holds(lambda share: 0.0 < share < 1.0, reduction):
            raise ValueError(f"reduction must be above 0 and below 1, not {reduction!r}")
        self.master_weights = master_weights
        always = matching(model, always_train)
        before = {p: p.requires_grad for p in model.parameters()}
        self.ranks = _ranks(model, reduction, always)
        factorize_linears(model, self.ranks)
        factors = [p for module in low_rank_linears(model).values() for p in (module.up, module.down)]
        trained = [*factors, *_norms(model), *always]
        super().__init__(model, defaults, may_train=trained, fp32_gradients=fp32_gradients)
        self._requires_grad = before
        self._looked = False  # were gradients looked for, at the first step?

    @property
    def elementwise(self) -> bool:
        return True

    def update(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        adamw_update([self.state[p] for p in params], params, grads, group, self.master_weights)

    def before_update(self) -> None:
        if not self._looked:
            self._looked = True
            parts = {name: (module.up, module.down) for name, module in low_rank_linears(self.model).items()}
            warn_of_idle("factors", parts, "freeze them before building the method")

    def expected_state(self, p: nn.Parameter, saved: dict[str, Any]) -> dict[str, Any]:
        return expected_adam_state(p, self.master_weights)

    def finished_state_dict(self) -> dict[str, Tensor]:
        return dense_state_dict(self.model)

    def extra_state(self) -> dict[str, Any]:
        return {"ranks": dict(self.ranks)}

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        if extra["ranks"] != self.ranks:
            raise ValueError(
                "this state was saved with other ranks: build the method on the weights that it was first built on, "
                "with the same reduction"
            )

    @torch.no_grad()
    def finish(self) -> nn.Module:
        """End the training: multiply the factors and return the model in its original, dense form."""
        model = super().finish()
        restore_linears(model)
        return model


def _ranks(model: nn.Module, reduction: float, always: list[nn.Parameter]) -> dict[str, int]:
    """The rank of each matrix that is to be factorised, by the name of its module."""
    owners = Counter(p for module in model.modules() for p in module.parameters(recurse=False))
    weights: dict[str, Any] = {name: model.get_submodule(name).weight for name in frozen_linears(model, (), always)}
    # factors of a tied one would untie it, and an empty one has no singular values
    weights = {name: p for name, p in weights.items() if owners[p] == 1 and p.numel()}
    if not weights:
        raise ValueError("WeLore needs linear modules in the model's layers that are neither frozen nor always trained")
    ranks = zip(weights, kept_ranks(list(weights.values()), reduction), strict=True)
    low = {name: rank for name, rank in ranks if rank is not None}
    if not low:
        raise ValueError(
            f"with reduction={reduction} none of {len(weights)} matrices loses more than half of its rank, so none "
            "would be trained: raise it"
        )
    return low


def _norms(model: nn.Module) -> list[nn.Parameter]:
    norms = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    return [p for module in norms for p in module.parameters(recurse=False)]
