"""The leading singular vectors of a matrix: exactly, or by randomised subspace iteration.

Halko, Martinsson & Tropp, SIAM Review 2011, arXiv 0909.4061, Algorithms 4.4 and 5.1.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

OVERSAMPLING = 16  # random directions beyond the rank, at least: they make the iteration converge
ITERATIONS = 6  # multiplications by A A^T; each multiplies a direction's share by its squared singular value

Vectors = tuple[Tensor | None, Tensor | None]


def exact_vectors(matrix: Tensor, rank: int, left: bool, right: bool) -> Vectors:
    """The first `rank` singular vectors by a full SVD, as copies: a slice would keep all of them alive.

    Args:
        matrix: (m, n), fp32.
        rank: at most min(m, n).
        left: return U, (m, rank).
        right: return V^T, (rank, n).
    """
    # LAPACK raises on values that aren't finite: a diverged run must be reported as diverged
    u, _, vh = torch.linalg.svd(matrix.nan_to_num(0.0, 0.0, 0.0), full_matrices=False)
    return u[:, :rank].clone() if left else None, vh[:rank].clone() if right else None


def randomized_vectors(matrix: Tensor, rank: int, left: bool, right: bool, key: tuple[int, ...]) -> Vectors:
    """Like `exact_vectors`, but with a span of nearly the same energy, at the cost of a few matrix products.

    The iteration runs on the shorter side of the matrix; the vectors of the other side follow by one product.

    Args:
        matrix: (m, n), fp32.
        rank: at most min(m, n).
        left: return U, (m, rank).
        right: return V^T, (rank, n).
        key: determines the random start, on any device.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    a = matrix if wide else matrix.t()  # (short, long)
    short = _leading_left(a, rank, key)
    # the columns of A^T U are already orthogonal unless A has a lower rank, in which case QR completes them
    long = torch.linalg.qr(a.t() @ short).Q if (right if wide else left) else None
    u, v = (short, long) if wide else (long, short)
    return u if left else None, v.t() if right and v is not None else None


def _leading_left(a: Tensor, rank: int, key: tuple[int, ...]) -> Tensor:
    """The leading left singular vectors of `a` (short, long): a Tensor (short, rank) with orthonormal columns."""
    short = a.shape[0]
    width = min(rank + max(OVERSAMPLING, rank // 4), short)
    if width == short:
        return _leading_eigenvectors(a @ a.t(), rank)
    # A A^T is formed once if that costs less than all the products with A and A^T
    gram = a @ a.t() if short <= 2 * (ITERATIONS + 1) * width else None
    basis = _random(short, width, key).to(a.device)
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(_times_gram(a, gram, basis)).Q
    return basis @ _leading_eigenvectors(basis.t() @ _times_gram(a, gram, basis), rank)


def _times_gram(a: Tensor, gram: Tensor | None, basis: Tensor) -> Tensor:
    """A A^T times `basis`."""
    return a @ (a.t() @ basis) if gram is None else gram @ basis


def _leading_eigenvectors(symmetric: Tensor, rank: int) -> Tensor:
    # in fp64: in fp32 LAPACK raises or returns NaN for one in ten matrices with rows of zeros, as idle neurons have
    exact = symmetric.nan_to_num(0.0, 0.0, 0.0).double()  # LAPACK would raise: see `exact_vectors`
    vectors = torch.linalg.eigh(exact).eigenvectors[:, -rank:].flip(1)  # eigenvalues come in increasing order
    return vectors.to(symmetric.dtype)


def _random(rows: int, columns: int, key: tuple[int, ...]) -> Tensor:
    seed = random.Random("/".join(map(str, key))).getrandbits(63)
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float32, device="cpu")
