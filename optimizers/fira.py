"""Fira: GaLore, and what its subspace leaves out (Chen et al., NeurIPS 2025, arXiv 2410.01623)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from optimizers.galore import GaLore
from optimizers.registry import register
from optimizers.shared.arithmetic import bias_correction, decayed
from optimizers.shared.growth import limit_growth
from optimizers.shared.masters import exact_dtype
from optimizers.shared.matrices import Matrix
from optimizers.shared.norms import norm_of
from optimizers.shared.projections import add_back, left_out


@register("fira")
class Fira(GaLore):
    """Fira (Algorithm 1): GaLore's step, plus the rest of the gradient, scaled as Adam scales the part in the subspace.

    For a gradient G (m, n) with m < n (otherwise transposed): P, R = P^T G and Adam's step N from R as in GaLore;
    S = (G - P R) diag(s) with s_j = norm(N_j) / norm(R_j) for each of the n columns, scaled down if its norm grew by
    more than 1 %; W -= lr (alpha P N + S), bias-corrected. With alpha = 1 this is the authors' package, whose rest for
    another alpha is G - alpha P R, so that a part of R is counted twice.

    Trains everything; embeddings, head, vectors and tensors of three or more dimensions, but for experts', get plain
    AdamW. Keeps what GaLore keeps, and a norm of 4 bytes per matrix. One temporary is as large as a matrix.

    Args:
        model: the model to train; its layers are in `nn.ModuleList`s.
        lr: learning rate.
        weight_decay: decoupled; for tensors of two or more dimensions, biases excepted.
        betas, eps: as in Adam; eps is added after the bias correction, as torch does.
        rank: r; at most the shorter side of a matrix is used.
        update_every: T, how many updates of a matrix share a subspace; the first one chooses it, unless its gradient is
            zero: then the next does.
        scale: alpha, of the part in the subspace.
        svd: "randomized", or "exact": a full SVD, tens of times slower.
        in_backward: update inside the backward pass, so that only one gradient exists at a time.
        seed: for the randomised SVD.

    Raises:
        ValueError: a value is out of range, or the model has no list of layers.
    """

    summary = "GaLore, and the rest of each gradient with its columns scaled as Adam scales those in the subspace"
    paper = "Chen, Feng, Li, Lai, Yue, Yuan & Wang, NeurIPS 2025, arXiv 2410.01623"
    keeps = "m r + 2 n r values per m x n matrix (m <= n), in the weights' dtype, and 8 B; two per weight of the rest"
    example = {"lr": 1e-2, "rank": 4, "update_every": 3}
    added_later = ()

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-2,
        weight_decay: float = 0.0,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        rank: int = 128,
        update_every: int = 200,
        scale: float = 1.0,
        svd: str = "randomized",
        in_backward: bool = False,
        seed: int = 0,
    ):
        super().__init__(
            model,
            lr,
            weight_decay,
            betas=betas,
            eps=eps,
            rank=rank,
            update_every=update_every,
            scale=scale,
            svd=svd,
            in_backward=in_backward,
            seed=seed,
        )

    def expected_of_matrix(self, p: Tensor, rows: int, columns: int, saved: dict[str, Any]) -> dict[str, Any]:
        norm = torch.empty((), dtype=exact_dtype(p), device="meta")
        return {**super().expected_of_matrix(p, rows, columns, saved), "norm": norm}

    def _apply(
        self, matrix: Matrix, low_rank: Tensor, step: Tensor, subspace: dict[str, Tensor], group: dict[str, Any]
    ) -> None:
        state = matrix.state
        projected = 0 if "left" in subspace else 1
        of_step, of_low_rank = (norm_of(t, dim=projected, keepdim=True) for t in (step, low_rank))
        rest = left_out(matrix.gradient, low_rank, subspace).mul_(of_step / (of_low_rank + 1e-8))
        norm = norm_of(rest)
        norm /= bias_correction(group, state["step"])  # Adam's steps: `updates` leaves out zero gradients
        rest.mul_(-group["lr"] * limit_growth(state, norm))
        add_back(rest, step, subspace, 1.0, group["lr"] * self.scale)
        for weights, place in decayed(matrix.weights, group):
            weights.add_(rest[place])
