"""GaLore: gradient low-rank projection (Zhao et al., ICML 2024, arXiv 2403.03507)."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from optimizers.base import MemoryEfficientOptimizer, check_choice, check_count, check_positive
from optimizers.registry import register
from optimizers.shared.adapters import frozen_linears
from optimizers.shared.affine_linear import quantize_linears
from optimizers.shared.inner import InnerAdamW
from optimizers.shared.matrices import Matrix, expected_of_matrices, layer_matrices, update_matrices
from optimizers.shared.projections import (
    SIDES,
    add_back,
    add_back_at_random,
    add_back_in_8_bits,
    drop_subspace,
    first_vector,
    keep_subspace,
    kept_subspace,
    note_choice,
    project,
    sides,
)
from optimizers.shared.rounding import generator
from optimizers.shared.saved_states import check_same_settings
from optimizers.shared.sharded import has_values
from optimizers.shared.stand_ins import dense_state_dict, restore_linears
from optimizers.shared.subspace import exact_vectors, randomized_vectors

PROJECTIONS = ("std", "reverse_std", "left", "right", "full")
SVDS = ("randomized", "exact")
WEIGHTS = ("full", "8bit")


@register("galore")
class GaLore(MemoryEfficientOptimizer):
    """GaLore (Algorithm 2): Adam in a rank-r subspace of each gradient, chosen again every T steps.

    For a gradient G (m, n): P holds the leading singular vectors of the shorter side of G; R = P^T G; N is Adam's step
    from R; W -= lr alpha P N. When the subspace changes, the moments are neither rotated nor reset.

    Trains everything. The matrices in the model's layers are projected, of a tensor of experts each one's; embeddings,
    head, vectors and other tensors of three or more dimensions get plain AdamW. Keeps, for a matrix of m <= n at rank
    r, the projection (m r) and two moments (2 n r), in the dtype of the weights: pure low precision for a low-precision
    model, as in the authors' package.

    `states="8bit"` keeps the moments in 2.03 bytes per value, `projection_bits=4` P in .52, and `weights="8bit"` the
    matrices of the layers' linear modules themselves in 1.02, without any other copy: with `lazy` this is Q-GaLore
    (Zhang et al., 2024, arXiv 2407.08296), whose package stores each 4-bit number in a byte. Weights in 8 bits are
    restored for each product, and rounded at random when they are updated, since most updates are smaller than a step
    of 8 bits. Use them with `in_backward`: a gradient is as large as ever. What isn't a linear module of its own stays
    as it is: experts in one tensor, weights that are tied, those that a module reads from another.

    Args:
        model: the model to train; its layers are in `nn.ModuleList`s.
        lr: learning rate.
        weight_decay: decoupled, not scaled by `scale`; for tensors of two or more dimensions, biases excepted.
        betas, eps: as in Adam; eps is added after the bias correction, as torch does.
        rank: r; at most the shorter side of a matrix is used.
        update_every: T, how many updates of a matrix share a subspace; the first one chooses it, unless its gradient is
            zero: then the next does.
        scale: alpha.
        projection: "std" projects the rows of a matrix that is wider than it is high and the columns of any other;
            "reverse_std" does the reverse; "left" always projects the rows, "right" always the columns; "full" both,
            with moments of (r, r).
        svd: "randomized", or "exact": a full SVD, tens of times slower.
        in_backward: update inside the backward pass, so that only one gradient exists at a time.
        states: "full", or "8bit": Adam's moments in 8 bits.
        projection_bits: 4 or 8: P in that many bits, in groups of 256 (Q-GaLore: 4); None: in the weights' dtype.
        lazy: double the time to the next choice once the leading vector of a matrix's subspace is stable: its cosine
            with the previous choice's, averaged over the last 5 choices, is at least .4 (Q-GaLore).
        stochastic_rounding: round bf16 weights up or down at random.
        weights: "full", or "8bit": those of the layers' linear modules in groups of 256; `finish()` makes them dense.
        seed: for the randomised SVD and the rounding.

    Raises:
        ValueError: a value is out of range, the model has no list of layers, or nothing in them is for 8 bits.
    """

    summary = "Adam in a low-rank subspace of each gradient, chosen again every T steps"
    paper = "Zhao, Zhang, Chen, Wang, Anandkumar & Tian, ICML 2024, arXiv 2403.03507"
    trains = "everything"
    keeps = "m r + 2 n r values per m x n matrix (m <= n), in the weights' dtype; two per weight of the rest"
    excludes = "in_backward: accumulation, loop clipping, fp16 scaling"
    example = {"lr": 1e-2, "rank": 4, "update_every": 3, "scale": 1.0}
    added_later: ClassVar[tuple[str, ...]] = ("states", "projection_bits", "lazy", "stochastic_rounding", "weights")

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
        states: str = "full",
        projection_bits: int | None = None,
        lazy: bool = False,
        stochastic_rounding: bool = False,
        weights: str = "full",
        seed: int = 0,
    ):
        check_count("rank", rank)
        check_count("update_every", update_every)
        check_choice("projection", projection, PROJECTIONS)
        check_choice("svd", svd, SVDS)
        check_positive("scale", scale)
        check_choice("weights", weights, WEIGHTS)
        if projection_bits not in (None, 4, 8):
            raise ValueError(f"projection_bits must be 4, 8 or None, not {projection_bits}")
        self.adamw = InnerAdamW(model, master_weights=False, states=states, stochastic_rounding=stochastic_rounding)
        self.adamw_inside = InnerAdamW(model, master_weights=False, states=states)  # inside a subspace
        self.projection_bits, self.lazy = projection_bits, lazy
        self.rank, self.update_every, self.scale = rank, update_every, scale
        self.projection, self.svd, self.seed = projection, svd, seed
        # of the matrices that are projected
        self._matrices = layer_matrices(model)
        linear = self._for_8_bits(model) if weights == "8bit" else []
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        self.adds_parameters = bool(linear)
        super().__init__(model, defaults, in_backward=in_backward)
        self._in_8_bits = quantize_linears(model, linear)

    def _for_8_bits(self, model: nn.Module) -> list[str]:
        """Names of the linear modules in the layers, but for those of torch's encoders, which read their weights."""
        linear = frozen_linears(model, (), ())
        found = [name for name in linear if model.get_submodule(name).weight in self._matrices]
        read = [name for name, module in model.named_modules() if isinstance(module, nn.TransformerEncoderLayer)]
        found = [name for name in found if name.rpartition(".")[0] not in read]
        if not found:
            raise ValueError("weights='8bit' is for linear modules in the model's layers, and none is trained there")
        return found

    @property
    def why_not_sharded(self) -> str | None:
        return "has weights in 8 bits, which FSDP2 can't shard" if self.adds_parameters else super().why_not_sharded

    def finished_state_dict(self) -> dict[str, Tensor]:
        return dense_state_dict(self.model)

    @torch.no_grad()
    def finish(self) -> nn.Module:
        """End the training; weights in 8 bits become dense, with the values of their codes."""
        model = super().finish()
        restore_linears(model)
        return model

    def before_backward(self, loss: Tensor) -> None:
        super().before_backward(loss)
        if self._in_8_bits and not self._steps_done and has_values(loss) and loss.isnan().any():
            raise RuntimeError(
                "GaLore's first loss with weights='8bit' is NaN. If it isn't with weights='full', this model reads "
                "weights of its linear modules without calling these, and they have none in 8 bits: use weights='full'"
            )

    def update(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        update_matrices(self, self._matrices, params, grads, group, self._update_matrix, self.adamw)

    def advance(self) -> None:
        """Choose all subspaces again at the next update."""
        for state in self.state.values():
            if _has_subspace(state):
                state["due"] = copy.copy(state["updates"])

    def extra_state(self) -> dict[str, Any]:
        own = {"rank": self.rank, "projection": self.projection, "projection_bits": self.projection_bits}
        return own | {"weights": "8bit" if self._in_8_bits else None}

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        saved, own = ({**one, "weights": one.get("weights") or "full"} for one in (extra, self.extra_state()))
        check_same_settings(saved, own)

    def expected_state(self, p: nn.Parameter, saved: dict[str, Any]) -> dict[str, Any]:
        if p not in self._matrices:
            return self.adamw.expected_state(p)
        rows, columns = p.shape[-2:]
        return expected_of_matrices(p, self.expected_of_matrix(p, rows, columns, saved))

    def expected_of_matrix(self, p: Tensor, rows: int, columns: int, saved: dict[str, Any]) -> dict[str, Any]:
        """What is kept for a matrix (rows, columns) in the dtype of `p`, as meta tensors, where `saved` was."""
        left, right = sides(self.projection, rows, columns)
        rank = min(self.rank, rows, columns)
        state = self.adamw_inside.expected_state(p, saved, rank if left else rows, rank if right else columns)
        vectors = {"left": (rows, rank)} if left else {}
        vectors |= {"right": (rank, columns)} if right else {}
        if vectors.keys() & saved.keys():  # otherwise they were dropped, and will be chosen again
            subspace = {name: torch.empty(shape, dtype=p.dtype, device="meta") for name, shape in vectors.items()}
            keep_subspace(state, subspace, self.projection_bits)
        if self.lazy:
            state |= {"interval": 0} | ({"cosines": []} if "cosines" in saved else {})
        if self.lazy or "due" in saved:
            state["due"] = 0
        return {**state, "updates": 0}

    def _update_matrix(self, matrix: Matrix, group: dict[str, Any]) -> None:
        p, state, g = matrix.weights, matrix.state, matrix.gradient.to(matrix.weights.dtype)
        state.setdefault("updates", 0)
        due = self._is_due(state)
        waits = due and has_values(g) and not g.any()  # an expert had no tokens: its next gradient will choose
        if due and not (waits and _has_subspace(state)):
            self._choose_subspace(matrix, g)
        if not waits:
            state["updates"] += 1
        else:
            state["due"] = state["updates"]
        subspace = self._subspace(p, state)
        low_rank = project(g, subspace)
        step = torch.zeros_like(low_rank)  # becomes -N: what AdamW makes of zero weights at a rate of 1
        self.adamw_inside.update([state], [step], [low_rank], {**group, "lr": 1.0, "weight_decay": 0.0}, ())
        self._apply(replace(matrix, gradient=g), low_rank, step, subspace, group)

    def _apply(
        self, matrix: Matrix, low_rank: Tensor, step: Tensor, subspace: dict[str, Tensor], group: dict[str, Any]
    ) -> None:
        """Move a matrix by `step` (-N), which came from R (`low_rank`), a projection of its gradient."""
        p = matrix.weights
        decay, rate = 1.0 - group["lr"] * group["weight_decay"], group["lr"] * self.scale
        (key,) = self.rounding_keys([matrix.of])
        if matrix.of in self._in_8_bits:
            packed = self._in_8_bits[matrix.of].packed
            add_back_in_8_bits(packed, step, subspace, decay, rate, generator(key, p.device))
        elif self.adamw.stochastic_rounding and p.dtype is torch.bfloat16:
            add_back_at_random(p, step, subspace, decay, rate, generator(key + matrix.key[1:], p.device))
        else:
            add_back(p, step, subspace, decay, rate)

    def _is_due(self, state: dict[str, Any]) -> bool:
        if not _has_subspace(state):
            return True
        updates = state["updates"]
        return updates >= state["due"] if "due" in state else updates % self.update_every == 0  # of earlier versions

    def _subspace(self, p: Tensor, state: dict[str, Any]) -> dict[str, Tensor]:
        return kept_subspace(state, self.projection_bits, p, min(self.rank, *p.shape))

    def _choose_subspace(self, matrix: Matrix, g: Tensor) -> None:
        p, state = matrix.weights, matrix.state
        chosen_before = self.lazy and state["updates"]
        before = first_vector(self._subspace(p, state)) if chosen_before else None
        if p is matrix.of:  # an expert's is a part of all experts', and is overwritten
            drop_subspace(state)
        left, right = sides(self.projection, *p.shape)
        rank = min(self.rank, *p.shape)
        if self.svd == "exact":
            vectors = exact_vectors(g.float(), rank, left, right)
        else:
            vectors = randomized_vectors(g.float(), rank, left, right, (self.seed, state["updates"], *matrix.key))
        chosen = {name: v.to(p.dtype) for name, v in zip(SIDES, vectors, strict=True) if v is not None}
        keep_subspace(state, chosen, self.projection_bits)
        if self.lazy:
            note_choice(state, before, first_vector(chosen), self.update_every)
        else:
            state["due"] = state["updates"] + self.update_every


def _has_subspace(state: dict[str, Any]) -> bool:
    return not state.keys().isdisjoint(SIDES)
