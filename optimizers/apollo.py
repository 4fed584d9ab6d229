"""APOLLO: SGD with Adam's step sizes, estimated in a random subspace (Zhu et al., MLSys 2025, arXiv 2412.05270)."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from torch import Tensor, nn

from optimizers.base import MemoryEfficientOptimizer, check_choice, check_count, check_positive
from optimizers.registry import register
from optimizers.shared.arithmetic import adamw_update, bias_correction, decayed, expected_adam_state
from optimizers.shared.growth import limit_growth
from optimizers.shared.masters import exact_dtype
from optimizers.shared.matrices import Matrix, expected_of_matrices, layer_matrices, update_matrices
from optimizers.shared.norms import norm_of
from optimizers.shared.saved_states import check_same_settings
from optimizers.shared.sharded import has_values

SCALES = {"channel": 1.0, "tensor": 128.0}  # by scale_type: APOLLO's and APOLLO-Mini's


@register("apollo")
class APOLLO(MemoryEfficientOptimizer):
    """APOLLO (Algorithm 1): each channel of a gradient is scaled as Adam would scale it in a random subspace of rank r.

    For a gradient G (m, n) with m < n (otherwise transposed): P (r, m) ~ N(0, 1 / r), redrawn every T steps;
    R = P G; N = Adam's step from R, m / (sqrt(v) + eps); s_j = norm_of(N_j) / norm_of(R_j) for each of the n columns;
    U = G diag(s), scaled down if its norm grew by more than 1 %; W -= lr sqrt(scale) U, bias-corrected. With
    `scale_type="tensor"` s is one number for the whole matrix, for which rank 1 is enough: APOLLO-Mini. The moments are
    left as they are when P changes.

    Trains everything. Embeddings, head, vectors and tensors of three or more dimensions, but for experts' (each has its
    matrix), get plain AdamW. Keeps, for a matrix with m <= n, two moments of (r, n), in the dtype of the weights, and
    the last norm and a step count (8 bytes). P is regenerated from its seed at every step. No temporary is as large as
    a matrix, except fp32 copies of up to 16 MiB of low-precision weights when they decay.

    Args:
        model: the model to train; its layers are in `nn.ModuleList`s.
        lr: learning rate.
        weight_decay: decoupled; for tensors of two or more dimensions, biases excepted.
        betas: of Adam.
        eps: of Adam; for the layers' matrices it is added before the bias correction, as in the authors' package.
        rank: r; None for a quarter of a matrix's shorter side, or 1 with `scale_type="tensor"`.
        update_every: T, how many updates of a matrix share one P.
        scale: of the squared step (the paper's alpha is its root); None for 1, or 128 with `scale_type="tensor"`.
        scale_type: "channel" or "tensor".
        in_backward: update inside the backward pass, so that only one gradient exists at a time.
        seed: for the projections.

    Raises:
        ValueError: a value is out of range, or the model has no list of layers.
    """

    summary = "SGD with each channel scaled as Adam would scale it in a random low-rank subspace"
    paper = "Zhu, Zhang, Cong, Liu, Park, Chandra, Long, Pan, Wang & Lee, MLSys 2025, arXiv 2412.05270"
    trains = "everything"
    keeps = "2 n r values per m x n matrix (m <= n), in the weights' dtype, and 8 B; two values per weight of the rest"
    excludes = "in_backward: accumulation, loop clipping, fp16 scaling"
    example = {"lr": 1e-2, "update_every": 3}

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-2,
        weight_decay: float = 0.0,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        rank: int | None = None,
        update_every: int = 200,
        scale: float | None = None,
        scale_type: str = "channel",
        in_backward: bool = False,
        seed: int = 0,
    ):
        check_choice("scale_type", scale_type, tuple(SCALES))
        check_count("rank", rank, optional=True)
        check_count("update_every", update_every)
        check_positive("scale", scale, optional=True)
        self.rank = 1 if rank is None and scale_type == "tensor" else rank
        self.scale = SCALES[scale_type] if scale is None else scale
        self.update_every, self.scale_type, self.seed = update_every, scale_type, seed
        self._matrices = layer_matrices(model)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(model, defaults, in_backward=in_backward)

    def update(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        update_matrices(self, self._matrices, params, grads, group, self._update_matrix)

    def extra_state(self) -> dict[str, Any]:
        return {"rank": self.rank, "scale_type": self.scale_type, "seed": self.seed}

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        check_same_settings(extra, self.extra_state())

    def expected_state(self, p: nn.Parameter, saved: dict[str, Any]) -> dict[str, Any]:
        if p not in self._matrices:
            return expected_adam_state(p, master_weights=False)
        rows, columns = p.shape[-2:]
        rank = self.rank or max(1, min(rows, columns) // 4)
        low_rank = (rank, columns) if rows < columns else (rows, rank)
        norm = torch.empty((), dtype=exact_dtype(p), device="meta")
        return expected_of_matrices(p, {**expected_adam_state(p, False, *low_rank), "updates": 0, "norm": norm})

    def _update_matrix(self, matrix: Matrix, group: dict[str, Any]) -> None:
        p, state = matrix.weights, matrix.state
        g = matrix.gradient.to(p.dtype)
        updates = state.setdefault("updates", 0)
        state["updates"] = updates + 1
        summed = 0 if p.shape[0] < p.shape[1] else 1  # the shorter side, which is projected
        low_rank = self._project(g, summed, (self.seed, *matrix.key, updates // self.update_every))
        dims = (0, 1) if self.scale_type == "tensor" else (summed,)
        factors = self._adams_scale(state, low_rank, dims, group)
        norm = (norm_of(g, dim=dims, keepdim=True) * factors).norm()
        factors *= limit_growth(state, norm) * group["lr"] * math.sqrt(self.scale)
        factors *= bias_correction(group, state["updates"])
        for weights, place in decayed(p, group):
            weights.addcmul_(g[place], factors.expand_as(g)[place], value=-1.0)

    def _project(self, g: Tensor, side: int, key: tuple[int, ...]) -> Tensor:
        """R for a gradient (m, n): (r, n) if `side` is 0, (m, r) if it is 1."""
        length = g.shape[side]
        projection = random_projection(self.rank or max(1, length // 4), length, g, key)
        return projection @ g if side == 0 else g @ projection.t()

    def _adams_scale(
        self, state: dict[str, Any], low_rank: Tensor, dims: tuple[int, ...], group: dict[str, Any]
    ) -> Tensor:
        """s = norm_of(N) / norm_of(R), with norms over `dims`, which stay as dimensions of size 1."""
        correction = bias_correction(group, state["updates"])
        # torch adds eps after the correction
        eps = group["eps"] / math.sqrt(1.0 - group["betas"][1] ** state["updates"])
        step = torch.zeros_like(low_rank)  # becomes -N times the correction
        settings = {**group, "lr": 1.0, "weight_decay": 0.0, "eps": eps}
        adamw_update([state], [step], [low_rank], settings, master_weights=False)
        norms = [norm_of(t, dim=dims, keepdim=True) for t in (step, low_rank)]
        return norms[0] / (norms[1] + 1e-8) / correction


def random_projection(rank: int, length: int, like: Tensor, key: tuple[int, ...]) -> Tensor:
    """P (rank, length) ~ N(0, 1 / rank), in the dtype and on the device of `like`; it depends on `key` alone there."""
    if not has_values(like):
        return like.new_empty(rank, length)
    generator = torch.Generator(like.device).manual_seed(random.Random("/".join(map(str, key))).getrandbits(63))
    return torch.randn(rank, length, generator=generator, dtype=like.dtype, device=like.device).div_(math.sqrt(rank))
