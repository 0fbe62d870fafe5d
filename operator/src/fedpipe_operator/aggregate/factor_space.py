"""A matrix aggregated as a sum of products (METHOD §4): stack the terms, cut the sum, compare the nodes."""

from collections.abc import Callable, Mapping

import numpy as np

from fedpipe_api.wire import LORA_A, LORA_B, sent_as_int8

from . import server as optimizer
from .checks import Comparison, NotFiniteError
from .factors import Factorization, Float64, Geometry, Stack, rounding_error
from .files import Float32
from .matrix import Aggregated, Contribution, Matrix, factors, figures, probed, probed_sum, saved
from .sent import received

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


def in_factor_space(matrix: Matrix, starts_from_best: bool, untrained: Untrained) -> Aggregated:
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
    rounded = sent_as_int8(matrix.aggregation.method)
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
        mean = factorization.compress(mean_change, terms.keep)
        squares, dots = _compare_again(matrix, mean, start, started)
        # What was folded away is no longer among the terms: the exact target is met through probes instead.
        target = step.gain * step.new * probed_sum(matrix)
        places = [(previous, ours), (state, theirs), *([(start, begun)] if rounded else [])]
        for stored, place in places:
            target += probed(stored, reference[place]) if stored else 0
        error, energy = float(np.linalg.norm(probed(tensors) - target)), float(np.sum(target * target))
    else:
        squares, dots = _compare(matrix, factorization.geometry, mean_change, begun, started)
        energy = factorization.geometry.square(reference)
        error = float(np.hypot(new.error, rounding_error(new, tensors[LORA_B].T, tensors[LORA_A])))
    comparison = _comparison(matrix, squares, dots, factorization.geometry.square(mean_change))
    found = figures(
        new.sigma,
        rank=len(new.sigma),
        error=error,
        reference_energy=energy,
        discarded=new.discarded,
        energy=new.energy,
    )
    return Aggregated(tensors, moved, comparison, found)


def _step(
    matrix: Matrix, state: Mapping[str, Float32], square: float
) -> tuple[optimizer.Step[float], dict[str, Float32]]:
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


def _comparison(matrix: Matrix, squares: Float64, dots: Float64, total: float) -> Comparison:
    comparison = Comparison(matrix.nodes)
    comparison.add(
        nodes=[part.node for part in matrix.contributions],
        weights=matrix.weights,
        clipped=matrix.weights * matrix.clips,
        squares=np.maximum(0, squares),
        dots=dots,
        total=total,
    )
    return comparison


def _compare(
    matrix: Matrix, geometry: Geometry, mean_change: Float64, begun: slice, started: Float64
) -> tuple[Float64, Float64]:
    """Return ‖D_k‖² and <D_k, Σ w c D> of every node from the inner products of all terms."""
    each = np.zeros((len(matrix.contributions), len(mean_change)))  # D_k in the terms
    first = 0
    for row, part in zip(each, matrix.contributions, strict=True):
        row[first : first + part.rank] = 1
        first += part.rank
    each[:, begun] = -started
    products = each @ geometry.products
    return np.sum(products * each, axis=1), products @ mean_change


def _compare_again(
    matrix: Matrix, mean: tuple[Float64, Float64], start: Mapping[str, Float32], started: Float64
) -> tuple[Float64, Float64]:
    """Return the same for folded nodes, reading each once more beside Σ w c D and what nodes started from."""
    beside, rank = Stack(*matrix.shape, len(mean[0]) + started.shape[1]), len(mean[0])
    beside.append(*mean)
    if start:
        beside.append(start[LORA_B].T, start[LORA_A])
    among = (beside.left @ beside.left.T) * (beside.right @ beside.right.T)
    node = Stack(*matrix.shape, max(part.rank for part in matrix.contributions))
    squares, dots = np.zeros(len(started)), np.zeros(len(started))
    for index, part in enumerate(matrix.contributions):
        node.clear()
        _append(node, matrix, part)
        own = float(np.sum((node.left @ node.left.T) * (node.right @ node.right.T)))
        across = np.sum((node.left @ beside.left.T) * (node.right @ beside.right.T), axis=0)
        squares[index] = own - 2 * across[rank:] @ started[index]
        squares[index] += started[index] @ among[rank:, rank:] @ started[index]
        dots[index] = across[:rank].sum() - started[index] @ among[rank:, :rank].sum(axis=1)
    return squares, dots
