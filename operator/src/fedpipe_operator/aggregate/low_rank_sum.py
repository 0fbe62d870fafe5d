# SPDX-License-Identifier: Apache-2.0
"""A matrix aggregated as a sum of products (METHOD §4): stack the terms, cut the sum, compare the nodes."""

from collections.abc import Callable, Mapping

import numpy as np

from fedpipe_api.lora.codec import Float32, received
from fedpipe_api.lora.format import LORA_A, LORA_B

from . import server_optimizer as optimizer
from .comparison import NotFiniteError, Products
from .contribution import (
    Aggregated,
    Contribution,
    Matrix,
    factors,
    figures,
    saved,
)
from .factors import Factorization, Float64, Geometry, Stack, rounding_error
from .sketches import probed, probed_sum, sketched

FOLD_ROOM, FOLD_KEEP = 768, 128
"""Terms of nodes stacked at a time, and what they fold into beyond that; more of both for large ranks."""

Untrained = Callable[[Float64, Float64, Float64], Float64]
"""From w, c and `started` (Matrix.started) to the coefficients of G's components in the change S of G."""


class _Terms:
    """The terms of a matrix: the nodes' products, folded in order where too many, then what is stored."""

    def __init__(self, matrix: Matrix, stored: int) -> None:
        ranks = [part.rank for part in matrix.contributions]
        self._matrix = matrix
        self.keep = max(FOLD_KEEP, 2 * matrix.aggregation.max_global_rank)
        self._room = max(FOLD_ROOM, self.keep + 2 * max(ranks))
        self.stack = Stack(*matrix.shape, min(sum(ranks), self._room) + stored)
        self.coefficients: list[float] = []
        self._first, self._since = 0, 0
        for index, part in enumerate(matrix.contributions):
            if self.stack.size + part.rank > self._room:
                self._fold(index)
            _append(self.stack, matrix, part)
            self.coefficients += [part.weight * part.clip] * part.rank

    def _fold(self, index: int) -> None:
        left, right = self.factorize().compress(np.array(self.coefficients), self.keep)
        self.stack.clear()
        self.stack.append(left, right)
        self.coefficients = [1.0] * self.stack.size
        self._first, self._since = self.stack.size, index

    @property
    def folded(self) -> bool:
        """Whether some nodes no longer stand by themselves."""
        return self._since > 0

    def append_stored(self, stored: Mapping[str, Float32]) -> slice:
        """Add the terms of a stored product, not yet part of the sum; return where they stand."""
        first = self.stack.size
        if stored:
            self.stack.append(stored[LORA_B].T, stored[LORA_A])
        self.coefficients += [0.0] * (self.stack.size - first)
        return slice(first, self.stack.size)

    def factorize(self) -> Factorization:
        """Return the factorization of all terms; raise NotFiniteError for a node with one not finite."""
        finite, first = self.stack.finite(), self._first
        for part in self._matrix.contributions[self._since :]:
            if not finite[first : first + part.rank].all():
                raise NotFiniteError(part.node)
            first += part.rank
        return Factorization(self.stack)


def _append(stack: Stack, matrix: Matrix, part: Contribution) -> None:
    left, right = (part.file.read(matrix.name + suffix) for suffix in (LORA_B, LORA_A))
    stack.append(left.T, right, part.scale)


def sum_products(matrix: Matrix, starts_from_best: bool, untrained: Untrained) -> Aggregated:
    """Aggregate a matrix in SVD form.

    Args:
        matrix: the matrix.
        starts_from_best: whether a node started from the best rank-r_k part of G; otherwise from nothing.
        untrained: what becomes of the components that nodes start from: G's, or those of what was sent.

    Raises:
        NotFiniteError: an update holds NaN or infinity.
    """
    previous = saved(matrix.previous, matrix.name, (LORA_A, LORA_B))
    state = saved(matrix.state, matrix.name, (LORA_A, LORA_B, optimizer.SECOND_MOMENT, optimizer.STEPS))
    rounded = matrix.rounded
    start = received(previous) if rounded else {}
    terms = _Terms(matrix, sum(len(stored[LORA_A]) for stored in (previous, start, state) if stored))
    ours, begun, theirs = (terms.append_stored(stored) for stored in (previous, start, state))
    if not rounded:
        start, begun = previous, ours
    factorization = terms.factorize()
    started = matrix.started(ours.stop - ours.start) * starts_from_best
    mean_change = np.array(terms.coefficients)  # Σ w c D
    change = mean_change.copy()  # S
    mean_change[begun] = -(matrix.weights * matrix.clips) @ started
    change[begun] = untrained(matrix.weights, matrix.clips, started)
    step, scalars = _step(matrix, state, factorization.geometry.square(change))
    before, velocity = np.zeros(len(change)), np.zeros(len(change))
    before[ours], velocity[theirs] = 1, step.keep
    reference = before + step.gain * (velocity + step.new * mean_change)
    velocity += step.new * change

    max_rank = matrix.aggregation.max_global_rank
    new = factorization.truncate(before + step.gain * velocity, max_rank, reference)
    tensors, moved = factors(new.left, new.right), scalars
    if optimizer.has_momentum(matrix.aggregation.server):
        kept = factorization.truncate(velocity, max_rank)
        moved = scalars | factors(kept.left, kept.right)
    if terms.folded:
        gram = _compare_folded(matrix, start, started)
        # What was folded away is no longer among the terms: the exact target is met through probes instead.
        target = step.gain * step.new * probed_sum(matrix)
        places = [(previous, ours), (state, theirs), *([(start, begun)] if rounded else [])]
        for stored, place in places:
            target += probed(stored, reference[place]) if stored else 0
        error, energy = float(np.linalg.norm(probed(tensors) - target)), float(np.sum(target * target))
    else:
        gram = _compare(matrix, factorization.geometry, begun, started)
        energy = factorization.geometry.square(reference)
        error = float(np.hypot(new.error, rounding_error(new, tensors[LORA_B].T, tensors[LORA_A])))
    products = Products([part.node for part in matrix.contributions], gram)
    found = figures(
        new.sigma,
        rank=len(new.sigma),
        error=error,
        reference_energy=energy,
        discarded=new.discarded,
        energy=new.energy,
    )
    return Aggregated(tensors, moved, (products,), found)


def _step(
    matrix: Matrix, state: Mapping[str, Float32], square: float
) -> tuple[optimizer.OptimizerStep[float], dict[str, Float32]]:
    """Return the server optimizer's step for ‖S‖_F² and the numbers that its state keeps."""
    server = matrix.aggregation.server
    steps = int(state[optimizer.STEPS][0]) if state else 0
    second = float(state[optimizer.SECOND_MOMENT][0]) if optimizer.SECOND_MOMENT in state else 0.0
    step = optimizer.advance(server, steps, second, square / (matrix.shape[0] * matrix.shape[1]))
    kept: dict[str, Float32] = {}
    if optimizer.has_momentum(server):
        kept[optimizer.STEPS] = np.array([steps + 1], np.float32)
    if optimizer.has_second_moment(server):
        kept[optimizer.SECOND_MOMENT] = np.array([step.second_moment], np.float32)
    return step, kept


def _compare(matrix: Matrix, geometry: Geometry, begun: slice, started: Float64) -> Float64:
    """Return <D_i, D_j> of all nodes from the inner products of all terms: (n, n)."""
    each = np.zeros((len(matrix.contributions), len(geometry.products)))  # D_k in the terms
    first = 0
    for row, part in zip(each, matrix.contributions, strict=True):
        row[first : first + part.rank] = 1
        first += part.rank
    each[:, begun] = -started
    return _symmetric(each @ geometry.products @ each.T)


def _compare_folded(matrix: Matrix, start: Mapping[str, Float32], started: Float64) -> Float64:
    """Return the same for folded nodes, reading each once more.

    Norms are exact; cosines are of sketches Ψᵀ D_k Ω (64 × 64), so that the cost grows with the nodes and not
    with their square. For a change of one matrix of effective rank ρ they err by 0.25 / √ρ, of M matrices by
    less than 0.25 / √M.
    """
    begun = Stack(*matrix.shape, started.shape[1])
    if start:
        begun.append(start[LORA_B].T, start[LORA_A])
    left, right = sketched(begun.left, 0), sketched(begun.right, 1)
    among = (begun.left @ begun.left.T) * (begun.right @ begun.right.T)
    node = Stack(*matrix.shape, max(part.rank for part in matrix.contributions))
    squares, sketches = np.zeros(len(started)), []
    for index, (part, from_start) in enumerate(zip(matrix.contributions, started, strict=True)):
        node.clear()
        _append(node, matrix, part)
        own = float(np.sum((node.left @ node.left.T) * (node.right @ node.right.T)))
        across = np.sum((node.left @ begun.left.T) * (node.right @ begun.right.T), axis=0)
        squares[index] = own - 2 * across @ from_start + from_start @ among @ from_start
        sketch = sketched(node.left, 0).T @ sketched(node.right, 1) - (left.T * from_start) @ right
        sketches.append(sketch.reshape(-1))
    seen = np.array(sketches)
    gram = _symmetric(seen @ seen.T)
    sizes = np.diag(gram)
    factors = np.sqrt(np.maximum(0, squares) / np.where(sizes > 0, sizes, np.inf))
    found: Float64 = gram * np.outer(factors, factors)
    return found


def _symmetric(gram: Float64) -> Float64:
    found: Float64 = (gram + gram.T) / 2
    return found
