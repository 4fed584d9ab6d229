"""GaLore: gradient low-rank projection (Zhao et al., ICML 2024, arXiv 2403.03507)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from optimizers.base import MemoryEfficientOptimizer, check_choice, check_count
from optimizers.registry import register
from optimizers.shared.arithmetic import adamw_update, expected_adam_state
from optimizers.shared.matrices import adamw_on_the_rest, layer_matrices
from optimizers.shared.subspace import exact_vectors, randomized_vectors

PROJECTIONS = ("std", "reverse_std", "left", "right", "full")
SVDS = ("randomized", "exact")


@register("galore")
class GaLore(MemoryEfficientOptimizer):
    """GaLore (Algorithm 2): Adam in a subspace of rank r of each gradient, chosen anew every T steps.

    For a gradient G (m, n): P holds the leading singular vectors of the shorter side of G; R = P^T G; N is Adam's step
    from R; W -= lr alpha P N. On a change of subspace the moments stay as they are, neither rotated nor reset.

    Trains everything. The matrices in the model's layers are projected; embeddings, head, vectors and tensors of three
    or more dimensions get plain AdamW. Keeps, for a matrix of m <= n at rank r, the projection (m r) and two moments
    (2 n r), in the dtype of the weights: pure low precision for a low-precision model, as the authors' package.

    Args:
        model: the model to train; its layers are in `nn.ModuleList`s.
        lr: learning rate.
        weight_decay: decoupled, not scaled by `scale`; for tensors of two or more dimensions.
        betas, eps: of Adam; eps is added after the bias correction, as torch does.
        rank: r; at most the shorter side of a matrix is used.
        update_every: T, updates of a matrix from one choice of its subspace to the next; the first update chooses.
        scale: alpha.
        projection: "std" projects the rows of a matrix that is wider than high and the columns of any other one;
            "reverse_std" the other way round; "left" always the rows, "right" always the columns; "full" both, with
            moments of (r, r).
        svd: "randomized", or "exact": a full SVD, tens of times slower.
        in_backward: update inside the backward pass, so that one gradient lives at a time.
        seed: of the randomised SVD.

    Raises:
        ValueError: a value is out of its range, or the model has no list of layers.
    """

    summary = "Adam in a low-rank subspace of each gradient, chosen anew every T steps"
    paper = "Zhao, Zhang, Chen, Wang, Anandkumar & Tian, ICML 2024, arXiv 2403.03507"
    trains = "everything"
    keeps = "m r + 2 n r values a matrix of m <= n, in the weights' dtype; two a weight of the rest"
    excludes = "in_backward: accumulation, loop clipping, fp16 scaling"
    example = {"lr": 1e-2, "rank": 4, "update_every": 3, "scale": 1.0}

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
        scale: float = 0.25,
        projection: str = "std",
        svd: str = "randomized",
        in_backward: bool = False,
        seed: int = 0,
    ):
        check_count("rank", rank)
        check_count("update_every", update_every)
        check_choice("projection", projection, PROJECTIONS)
        check_choice("svd", svd, SVDS)
        if not 0.0 < scale < float("inf"):
            raise ValueError(f"scale must be a finite number above 0, not {scale}")
        self.rank, self.update_every, self.scale = rank, update_every, scale
        self.projection, self.svd, self.seed = projection, svd, seed
        self._number: dict[Tensor, int] = {
            p: number for number, p in enumerate(layer_matrices(model))
        }  # those that are projected
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(model, defaults, in_backward=in_backward)

    def update(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        for p, g in adamw_on_the_rest(self, self._number, params, grads, group):
            self._update_matrix(p, g.to(p.dtype), group)

    def advance(self) -> None:
        """Choose all subspaces anew at the next update."""
        for state in self.state.values():
            drop_subspace(state)

    def extra_state(self) -> dict[str, Any]:
        return {"rank": self.rank, "projection": self.projection}

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        for name, value in self.extra_state().items():
            if extra[name] != value:
                raise ValueError(f"this state is of {name}={extra[name]!r}, not {value!r}")

    def expected_state(self, p: nn.Parameter, saved: dict[str, Any]) -> dict[str, Any]:
        if p not in self._number:
            return expected_adam_state(p, master_weights=False)
        left, right = sides(self.projection, *p.shape)
        rows, columns, rank = *p.shape, min(self.rank, *p.shape)
        state = expected_adam_state(p, False, rank if left else rows, rank if right else columns)
        vectors = {"left": (rows, rank)} if left else {}
        vectors |= {"right": (rank, columns)} if right else {}
        if vectors.keys() & saved.keys():  # else they were dropped, and will be chosen anew
            state |= {name: torch.empty(shape, dtype=p.dtype, device="meta") for name, shape in vectors.items()}
        return {**state, "updates": 0}

    def _update_matrix(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        updates = state.setdefault("updates", 0)
        if updates % self.update_every == 0 or not {"left", "right"} & state.keys():
            drop_subspace(state)
            self._choose_subspace(p, g, state)
        state["updates"] = updates + 1
        low_rank = project(g, state)
        step = torch.zeros_like(low_rank)  # becomes -N: the weights that AdamW moves, at a rate of 1
        adamw_update([state], [step], [low_rank], {**group, "lr": 1.0, "weight_decay": 0.0}, master_weights=False)
        decay = 1.0 - group["lr"] * group["weight_decay"]
        add_back(p, step, state, decay, group["lr"] * self.scale)

    def _choose_subspace(self, p: Tensor, g: Tensor, state: dict[str, Any]) -> None:
        left, right = sides(self.projection, *p.shape)
        rank = min(self.rank, *p.shape)
        if self.svd == "exact":
            vectors = exact_vectors(g.float(), rank, left, right)
        else:
            vectors = randomized_vectors(g.float(), rank, left, right, (self.seed, state["updates"], self._number[p]))
        state |= {name: v.to(p.dtype) for name, v in zip(("left", "right"), vectors, strict=True) if v is not None}


def sides(projection: str, rows: int, columns: int) -> tuple[bool, bool]:
    """Which sides of a matrix are projected: (left, right)."""
    if projection == "std":
        return rows < columns, rows >= columns
    if projection == "reverse_std":
        return rows >= columns, rows < columns
    return projection in ("left", "full"), projection in ("right", "full")


def project(g: Tensor, state: dict[str, Any]) -> Tensor:
    """G (m, n) in the subspace: (r, n), (m, r) or (r, r)."""
    if "left" in state:
        g = state["left"].t() @ g
    return g @ state["right"].t() if "right" in state else g


def add_back(p: Tensor, step: Tensor, state: dict[str, Any], decay: float, rate: float) -> None:
    """p = decay p + rate (the step in full), in place and without a full-sized temporary."""
    if "right" not in state:
        p.addmm_(state["left"], step, beta=decay, alpha=rate)
    else:
        p.addmm_(state["left"] @ step if "left" in state else step, state["right"], beta=decay, alpha=rate)


def drop_subspace(state: dict[str, Any]) -> None:
    state.pop("left", None)
    state.pop("right", None)
