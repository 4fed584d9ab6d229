"""Linear modules whose matrix is the product of two trained factors, as in WeLore (arXiv 2407.11239)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optimizers.shared.sharded import has_values
from optimizers.shared.stand_ins import StandIn


class LowRankLinear(StandIn):
    """y = (x down^T) up^T + b.

    up (out, rank) = U sqrt(S) and down (rank, in) = sqrt(S) V^T, from the leading singular values of its matrix.

    Args:
        dense: the linear module. Its weight is empty until `restore`.
        rank: how many singular values are kept.
    """

    def __init__(self, dense: Any, rank: int):
        super().__init__(dense)
        weight = dense.weight.detach()
        factors = _leading_factors(weight.t() if self._is_transposed else weight, rank)
        self.up, self.down = (nn.Parameter(factor.to(weight.dtype).contiguous()) for factor in factors)
        self.bias = dense.bias
        dense.weight.data = weight.new_empty(0)

    @property
    def weight(self) -> Tensor:
        """The product in the dense module's layout, computed on each access."""
        product = self.up @ self.down
        return product.t().contiguous() if self._is_transposed else product

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return F.linear(F.linear(x, self.down), self.up, self.bias)

    def dense_weight(self) -> Tensor:
        return self.weight


def low_rank_linears(model: nn.Module) -> dict[str, LowRankLinear]:
    """The modules that are products, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


def factorize_linears(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Replace the linear modules named in `ranks` by `LowRankLinear`s."""
    for name, rank in ranks.items():
        model.set_submodule(name, LowRankLinear(model.get_submodule(name), rank))


# ---- which matrices, of which rank


def kept_ranks(weights: Sequence[Tensor], reduction: float) -> list[int | None]:
    """The rank that each matrix keeps if all together lose this share of their singular values; None: it stays dense.

    Each matrix's singular values are scaled to 0..1, and all below one threshold tau are dropped, from whichever
    matrix. One that loses no more than half of its own stays dense, and whole. Without values (fake tensors), ranks
    are those that need the most memory.

    Args:
        weights: the matrices.
        reduction: the share, above 0 and below 1.
    """
    sizes = [min(weight.shape) for weight in weights]
    dropped = round(reduction * sum(sizes))
    if not all(map(has_values, weights)):
        return _largest_ranks([(m, n) for m, n in (weight.shape for weight in weights)], sum(sizes) - dropped)
    spectra = [_scaled_values(weight) for weight in weights]
    tau = torch.cat(spectra).sort().values[min(dropped, sum(sizes) - 1)]
    kept = [int((values >= tau).sum()) for values in spectra]
    return [k if 2 * k < size else None for k, size in zip(kept, sizes, strict=True)]


def _scaled_values(weight: Tensor) -> Tensor:
    """The singular values, their smallest at 0 and their largest at 1 (all at 1 if they are equal)."""
    values = torch.linalg.eigvalsh(_gram(_wide(weight.detach()))).clamp_(min=0.0).sqrt_().cpu()
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else torch.ones_like(values)


def _leading_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U sqrt(S) (m, rank) and sqrt(S) V^T (rank, n) of the leading singular values of `matrix` (m, n); fp64."""
    wide = _wide(matrix)
    squares, vectors = torch.linalg.eigh(_gram(wide))  # squares in increasing order
    squares, short = squares[-rank:].flip(0), vectors[:, -rank:].flip(1)
    known = squares > squares[0] * torch.finfo(squares.dtype).eps  # the others are 0 but for rounding, of either sign
    roots = squares.where(known, 0.0).pow(0.25)
    left, right = short * roots, (short.t() @ wide.double()) / roots.where(known, torch.inf)[:, None]
    return (left, right) if matrix.shape[0] <= matrix.shape[1] else (right.t(), left.t())


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()


def _gram(wide: Tensor) -> Tensor:
    """A A^T in fp64, whose eigenvalues are the squared singular values: much faster than an SVD of `wide`."""
    exact = wide.double()
    return exact @ exact.t()


def _largest_ranks(shapes: list[tuple[int, int]], kept: int) -> list[int | None]:
    """The ranks below half with the most weights in all factors, if at most `kept` singular values are kept in all.

    A factor's weights are trained, so they take more memory than any that stay dense.
    """
    ranks: list[int | None] = [None] * len(shapes)
    able = [i for i in range(len(shapes)) if min(shapes[i]) > 2]  # a smaller one keeps half, its largest value
    left = kept - len(able)
    for i in sorted(able, key=lambda i: -sum(shapes[i])):
        more = max(0, min((min(shapes[i]) - 1) // 2 - 1, left))
        ranks[i] = 1 + more
        left -= more
    return ranks
