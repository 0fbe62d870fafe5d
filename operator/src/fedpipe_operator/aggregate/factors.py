# SPDX-License-Identifier: Apache-2.0
"""Sums of low-rank matrices in factor space, without a dense d×c matrix (METHOD §4).

A sum M = Σ_i z_i l_i v_iᵀ of R rank-one terms is a stack of left (length d) and right (length c) vectors; the
coefficients z stand apart, because several sums over the same terms are wanted. In float64:

1. Thin QR of the right side, Vᵀ = Q·T, T p×R with p = min(R, c): O(c R²).
2. The Gram matrix of the left side, L Lᵀ: O(d R²).
3. Mᵀ M = Q (K L Lᵀ Kᵀ) Qᵀ with K = T·diag(z), so the largest eigenpairs (λ = σ², E) of that p×p core: O(R³).
4. M's best rank-k part is its projection M (QE)(QE)ᵀ: the right factor (QE)ᵀ by Householder reflections,
   the left factor M·QE by one product.

The right factor is orthonormal however badly conditioned the stack is; the only error is what the projection
leaves out, singular values under 1e-7 of the largest, which float32 storage could not hold anyway.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedpipe_api.lora.codec import Float32

Float64 = NDArray[np.float64]

NEGLIGIBLE = float(np.finfo(np.float32).eps)
"""Singular values below this share of the largest are dropped."""


@dataclass(frozen=True)
class Truncated:
    """The best rank-k part of a sum: left (k, d) rows u_i σ_i, right (k, c) orthonormal rows, σ descending.

    Signs: the entry of largest magnitude in each right vector is positive. k is at least 1; a zero matrix
    has σ = 0. `energy` is ‖M‖_F² of the sum, `error` ‖left·right − M'‖_F for the reference sum M' (by
    default M itself).
    """

    left: Float64
    right: Float64
    sigma: Float64
    energy: float
    error: float

    @property
    def discarded(self) -> float:
        """Share of the sum's σ² that is left out."""
        return max(0.0, 1.0 - float(self.sigma @ self.sigma) / self.energy) if self.energy > 0 else 0.0


class Stack:
    """Rank-one terms, one a row: `left` (R, d) and `right` (R, c), float64; room for a fixed number."""

    def __init__(self, rows: int, columns: int, room: int) -> None:
        self._left = np.empty((room, rows))
        self._right = np.empty((room, columns))
        self.size = 0

    @property
    def left(self) -> Float64:
        """The left vectors (R, d)."""
        return self._left[: self.size]

    @property
    def right(self) -> Float64:
        """The right vectors (R, c)."""
        return self._right[: self.size]

    def append(self, left: Float32 | Float64, right: Float32 | Float64, scale: float = 1.0) -> None:
        """Add the terms of scale·leftᵀ·right: left (r, d), right (r, c)."""
        place = slice(self.size, self.size + len(left))
        np.multiply(left, scale, out=self._left[place], dtype=np.float64)
        self._right[place] = right
        self.size = place.stop

    def clear(self) -> None:
        """Forget all terms."""
        self.size = 0

    def finite(self) -> NDArray[np.bool_]:
        """Return which terms are finite: (R,)."""
        return np.isfinite(_row_squares(self.left) * _row_squares(self.right))


def _row_squares(rows: Float64) -> Float64:
    return np.array([row @ row for row in rows])


class Geometry:
    """Inner products of sums over one stack, from the Gram matrices (R, R) of its left and right vectors."""

    def __init__(self, left: Float64, right: Float64) -> None:
        self.products = left * right
        """<l_i v_iᵀ, l_j v_jᵀ> for all i, j."""

    def square(self, coefficients: Float64) -> float:
        """Return ‖M‖_F² of one sum."""
        return max(0.0, float(coefficients @ self.products @ coefficients))


class Factorization:
    """The factorization of a stack of finite terms, from which any sum over them is truncated.

    Takes the stack's right side as its workspace: the stack must be cleared before it is used again.
    """

    def __init__(self, stack: Stack) -> None:
        from scipy.linalg.lapack import dgeqrf, dgeqrf_lwork

        self._stack = stack
        # Not scipy.linalg.qr_multiply: what Q is to multiply is known only from R, and for several sums.
        transposed = stack.right.T
        work = int(dgeqrf_lwork(*transposed.shape)[0])
        self._qr, self._tau, _, _ = dgeqrf(transposed, lwork=work, overwrite_a=1)
        self._rank = min(transposed.shape)
        self._triangle = np.triu(self._qr[: self._rank])
        self._left_gram = stack.left @ stack.left.T
        self.geometry = Geometry(self._left_gram, self._triangle.T @ self._triangle)

    def truncate(self, coefficients: Float64, max_rank: int, reference: Float64 | None = None) -> Truncated:
        """Return the best part of rank at most `max_rank` of the sum with these coefficients.

        Args:
            coefficients: z (R,), one a term of the stack.
            max_rank: bound of the rank.
            reference: coefficients of the sum that `error` compares with; the same sum by default.
        """
        core = self._triangle * coefficients
        weighted = core @ self._left_gram
        gram = weighted @ core.T
        energy = max(0.0, float(np.trace(gram)))
        vectors, error = self._leading(gram, max_rank)
        if reference is not None:
            other = vectors.T @ (self._triangle * reference)
            mine = vectors.T @ core
            cross = float(np.sum((vectors.T @ weighted) * (mine - 2 * other)))
            error = self.geometry.square(reference) + cross
        left = (vectors.T @ core) @ self._stack.left
        # The Gram matrix resolves σ only down to 1e-8 of the largest; this makes the factors exact.
        turn, sigma, left = np.linalg.svd(left, full_matrices=False)
        rank = max(1, int(np.sum(sigma > NEGLIGIBLE * sigma[0])))
        turn, sigma, left = turn[:, :rank], sigma[:rank], left[:rank]
        right = self._apply_q(vectors @ turn)
        sign = np.where(np.take_along_axis(right, np.abs(right).argmax(1)[:, None], 1) < 0, -1.0, 1.0)
        return Truncated(left * (sigma[:, None] * sign), right * sign, sigma, energy, max(0.0, error) ** 0.5)

    def compress(self, coefficients: Float64, max_rank: int) -> tuple[Float64, Float64]:
        """Return left (k, d) and right (k, c) of the same best part, not in SVD form and at less cost."""
        core = self._triangle * coefficients
        vectors, _ = self._leading(core @ self._left_gram @ core.T, max_rank)
        return (vectors.T @ core) @ self._stack.left, self._apply_q(vectors)

    def _leading(self, gram: Float64, count: int) -> tuple[Float64, float]:
        """Return the eigenvectors (p, k) of the largest eigenvalues, descending, and the others' sum."""
        from scipy.linalg import eigh

        total, kept = float(np.trace(gram)), min(count, self._rank)
        bounds = [self._rank - kept, self._rank - 1]
        values, vectors = eigh(gram, subset_by_index=bounds, check_finite=False, overwrite_a=True)
        return vectors[:, ::-1], total - float(values.sum())

    def _apply_q(self, inner: Float64) -> Float64:
        from scipy.linalg.lapack import dormqr

        columns, count = self._qr.shape[0], inner.shape[1]
        padded = np.zeros((columns, count), order="F")
        padded[: len(inner)] = inner
        found, _, _ = dormqr(
            "L", "N", self._qr[:, : self._rank], self._tau, padded, lwork=64 * 65 + 64 * count, overwrite_c=1
        )
        return np.ascontiguousarray(found.T)


def rounding_error(exact: Truncated, left: Float32, right: Float32) -> float:
    """Return ‖left·right − exact‖_F, where float32 factors round the exact ones: (k, d) and (k, c) all."""
    # (left − exact.left) right + exact.left (right − exact.right): two small terms, so nothing cancels.
    lefts = np.concatenate([left - exact.left, exact.left])
    rights = np.concatenate([right.astype(np.float64), right - exact.right])
    return float(np.sqrt(max(0.0, float(np.sum((lefts @ lefts.T) * (rights @ rights.T))))))


def singular_values(left: Float32, right: Float32) -> Float64:
    """Return the singular values, descending, of the product of (d, r) and (r, c); O((d + c) r² + r³)."""
    left64, right64 = left.astype(np.float64), right.astype(np.float64)
    values, vectors = np.linalg.eigh(right64 @ right64.T)
    root = vectors * np.sqrt(np.maximum(values, 0))
    return np.sqrt(np.maximum(np.linalg.eigvalsh(root.T @ (left64.T @ left64) @ root), 0))[::-1]


def effective_rank(sigma: Float64) -> float:
    """Return exp of the entropy of σ²/Σσ²: how many directions carry the matrix; 0 for a zero matrix."""
    energy = sigma * sigma
    total = float(energy.sum())
    if total <= 0:
        return 0.0
    share = energy[energy > 0] / total
    return float(np.exp(-np.sum(share * np.log(share))))
