# SPDX-License-Identifier: Apache-2.0
"""Robust means from inner products alone (METHOD §5): every rule gives coefficients of the nodes' changes.

All take `products` (K, K), <D_i, D_j>, and the nodes' weights (K,); they return coefficients z ≥ 0 of sum 1:
the robust mean is Σ z_k D_k. Nothing dense is formed; the cost is that of the K × K matrix.
"""

import numpy as np
from numpy.typing import NDArray

from .factors import Float64

FEWEST = 3
"""Of two updates that disagree neither can be said to be the odd one."""

_ITERATIONS, _TOLERANCE, _CLIPPINGS = 200, 1e-9, 3
_SMOOTHING = 1e-6
"""Least distance that counts in the geometric median, as a share of the median one."""

_NEAR = 0.1
"""What is near to another, as a share of the usual 1 − cosine of two nodes."""

_NORMAL = 1.4826
"""Standard deviations of normal values in a median absolute deviation."""

_DEVIATIONS, _FAR_NORM, _FAR_COSINE = 3.0, 3.0, 0.1
"""What is far from the others: robust standard deviations, times the median norm, below the median cosine."""

_SIGNIFICANCE = 0.01
"""Share of rounds without a hostile node in which a cosine may be called far from the others."""


def distances(products: Float64, coefficients: Float64) -> Float64:
    """Return ‖D_k − Σ z D‖ of every node: (K,)."""
    to_centre = products @ coefficients
    squares = np.diag(products) - 2 * to_centre + coefficients @ to_centre
    return np.sqrt(np.maximum(0, squares))


def geometric_median(products: Float64, weights: Float64) -> Float64:
    """Return the coefficients of the point x of least Σ w_k ‖D_k − x‖ (RFA: smoothed Weiszfeld steps)."""
    shares = _normalised(weights)
    norms = np.sqrt(np.maximum(0, np.diag(products)))
    # From where no single change counts for more than an ordinary one, so that huge ones cost no steps.
    least = float(np.median(norms))
    found = _normalised(shares / np.maximum(norms, least) ** 2) if least > 0 else shares
    for _ in range(_ITERATIONS):
        apart = distances(products, found)
        least = _SMOOTHING * float(np.median(apart))
        if least == 0:
            return _normalised(shares * (apart <= 0))
        new = _normalised(shares / np.maximum(apart, least))
        step, found = float(np.abs(new - found).max()), new
        if step < _TOLERANCE:
            break
    return found


def centered_clipping(products: Float64, weights: Float64) -> Float64:
    """Return the coefficients of v + Σ w_k (D_k − v)·min(1, τ / ‖D_k − v‖), three times over.

    v is at first the geometric median with one vote a node; τ is the median distance to it.
    """
    shares = _normalised(weights)
    centre = geometric_median(products, np.ones(len(weights)))
    radius = float(np.median(distances(products, centre)))
    for _ in range(_CLIPPINGS):
        apart = distances(products, centre)
        kept = shares * np.minimum(1, radius / np.where(apart > radius, apart, max(radius, 1e-300)))
        centre = kept + (1 - kept.sum()) * centre
    return _normalised(centre)


def multi_krum(products: Float64, weights: Float64, byzantine: int) -> Float64:
    """Return the weights of the K − f updates nearest to their K − f − 2 nearest others, and zeros.

    `byzantine` is f; with too few nodes (K − 3) // 2 takes its place.
    """
    nodes = len(weights)
    byzantine = max(0, min(byzantine, (nodes - 3) // 2))
    squares = np.diag(products)
    apart = np.maximum(0, squares[:, None] + squares - 2 * products)
    np.fill_diagonal(apart, np.inf)
    near = np.sort(apart, axis=1)[:, : max(1, nodes - byzantine - 2)].sum(axis=1)
    chosen = np.zeros(nodes)
    chosen[np.argsort(near, kind="stable")[: nodes - byzantine]] = 1
    return _normalised(weights * chosen)


def far_norms(norms: Float64) -> tuple[NDArray[np.bool_], float]:
    """Return which norms are far above the others: (K,); and the median norm, zeros left out.

    Far is above three times the median and above three deviations of the logarithms.
    """
    positive = norms[norms > 0]
    if not len(positive):
        return np.zeros(len(norms), np.bool_), 0.0
    middle = float(np.median(positive))
    spread = float(np.exp(min(_DEVIATIONS * _deviation(np.log(positive)), 100)))
    return norms > middle * max(_FAR_NORM, spread), middle


def far_cosines(cosines: Float64) -> tuple[NDArray[np.bool_], float]:
    """Return which cosines are negative and far below the others: (K,), NaN never is; and the others' median.

    Far is what the generalized ESD test finds (Rosner 1983, one-sided: it finds many outliers that hide each
    other, and honest ones in about one of a hundred rounds if their cosines scatter normally), and 0.1 below.
    """
    known = np.flatnonzero(np.isfinite(cosines))
    order = known[np.argsort(cosines[known], kind="stable")]
    found = np.zeros(len(cosines), np.bool_)
    low = _low_outliers(cosines[order])
    middle = float(np.median(cosines[order[low:]])) if len(order) else 0.0
    found[order[:low]] = cosines[order[:low]] < min(0.0, middle - _FAR_COSINE)
    return found, middle


def _low_outliers(values: Float64) -> int:
    """Return how many of the first of ascending values are outliers, fewer than half."""
    from scipy.special import stdtrit

    found = 0
    for removed in range((len(values) - 1) // 2):
        rest = values[removed:]
        count, spread = len(rest), float(np.std(rest, ddof=1))
        quantile = stdtrit(count - 2, 1 - _SIGNIFICANCE / count)
        critical = (count - 1) * quantile / np.sqrt((count - 2 + quantile**2) * count)
        if rest.mean() - rest[0] > critical * spread:
            found = removed + 1
    return found


def near_copies(cosines: Float64) -> NDArray[np.bool_]:
    """Return which of the nodes (K, K cosines, NaN where unknown) send nearly the same as another one: (K,).

    Data of one's own leaves its noise in a change: nearer than a tenth of the usual 1 − cosine is no chance.
    Where half of the nodes or more would be, none are.
    """
    apart = 1 - np.where(np.isfinite(cosines), cosines, -1)
    known = apart[np.isfinite(cosines)]
    if not len(known):
        return np.zeros(len(cosines), np.bool_)
    near = np.min(apart, axis=1) < _NEAR * float(np.median(known))
    return near if 2 * near.sum() < len(near) else np.zeros(len(near), np.bool_)


def _deviation(values: Float64) -> float:
    """Return the median absolute deviation, scaled to the standard deviation of normal values."""
    return _NORMAL * float(np.median(np.abs(values - np.median(values))))


def _normalised(coefficients: Float64) -> Float64:
    found: Float64 = coefficients / coefficients.sum()
    return found
