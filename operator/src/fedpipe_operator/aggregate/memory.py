# SPDX-License-Identifier: Apache-2.0
"""How much memory an aggregation takes, predicted from shapes, ranks and settings (METHOD §4).

What is counted are the arrays of `low_rank_sum`, `factor_averaging` and `heads` that exist at once; what the
interpreter and its libraries hold beside them is `FIXED`. The tests measure it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fedpipe_api.job import Aggregation
from fedpipe_api.lora.format import Encoding

from . import server_optimizer as optimizer
from .factor_averaging import HELD_BYTES
from .low_rank_sum import FOLD_KEEP, FOLD_ROOM
from .sketches import SKETCH

FIXED = 10 * 2**20
"""Bytes of headers, threads and buffers of any aggregation; BLAS keeps more on some processors."""

_THREAD = 4 * 2**20
"""Bytes that BLAS and the allocator keep for a thread."""

_BLOCK = 4 * 2**20
_DOUBLE, _SINGLE = 8, 4


@dataclass(frozen=True)
class MatrixSize:
    """One matrix of a round: d rows, c columns, the ranks of those that trained it, and that of G before."""

    rows: int
    columns: int
    ranks: Sequence[int]
    previous: int


def peak_bytes(
    aggregation: Aggregation, matrices: Sequence[MatrixSize], heads: Sequence[int], nodes: int, threads: int
) -> int:
    """Return the bytes that an aggregation takes at its peak, above what its process holds before.

    Args:
        aggregation: the settings.
        matrices: the matrices that some node trained.
        heads: entries of each tensor that is trained whole.
        nodes: updates of the round.
        threads: matrices worked on at a time.
    """
    sizes = [_matrix(aggregation, matrix) for matrix in matrices]
    kept = sorted((result for _, result in sizes), reverse=True)
    work = sorted((peak for peak, _ in sizes), reverse=True)
    whole = max((_head(size, nodes) for size in heads), default=0)
    at_once = sorted([*work, *([whole] if whole else [])], reverse=True)[:threads]
    shapes = {side for matrix in matrices for side in (matrix.rows, matrix.columns)}
    folded = not aggregation.method.averages_factors and any(sum(m.ranks) > FOLD_ROOM // 2 for m in matrices)
    cached = sum(_DOUBLE * (SKETCH * folded + 8) * side for side in shapes)
    compared = 10 * _DOUBLE * nodes**2
    pieces = sum(kept[: threads + 1])
    return FIXED + threads * _THREAD + sum(at_once) + pieces + cached + compared


def _matrix(aggregation: Aggregation, matrix: MatrixSize) -> tuple[int, int]:
    """Return the bytes that a matrix takes while it is worked on, and those of its result."""
    if aggregation.method.averages_factors:
        return _entry_by_entry(aggregation, matrix)
    return _in_factor_space(aggregation, matrix)


def _in_factor_space(aggregation: Aggregation, matrix: MatrixSize) -> tuple[int, int]:
    rows, columns, ranks = matrix.rows, matrix.columns, matrix.ranks
    both, largest = rows + columns, max(ranks)
    momentum = optimizer.has_momentum(aggregation.server)
    rounded = aggregation.method.download is Encoding.INT8
    stored = matrix.previous * (1 + momentum + rounded)
    kept = min(aggregation.max_global_rank, rows, columns, sum(ranks) + stored)
    keep = max(FOLD_KEEP, 2 * aggregation.max_global_rank)
    room = max(FOLD_ROOM, keep + 2 * largest)
    folds = sum(ranks) > room
    terms = min(sum(ranks), room) + stored
    inner = min(terms, columns)
    read = _SINGLE * stored * both
    stack = _DOUBLE * terms * both
    one = _DOUBLE * kept * both
    # The triangle, two Gram matrices and their product; then the core, its Gram matrix and its eigenvectors.
    square = _DOUBLE * (3 * terms * terms + inner * terms)
    cores = _DOUBLE * (2 * inner * terms + 2 * inner * inner + inner * kept)
    leading = min(keep, inner)
    folding = cores + _DOUBLE * leading * both if folds else 0
    truncating = cores + _DOUBLE * kept * (3 * rows + 3 * columns)
    result = _SINGLE * kept * both * (1 + momentum)
    rounding = one * (1 + momentum) + result + _DOUBLE * kept * (2 * rows + 4 * columns)
    if folds:
        sketches = 2 * _DOUBLE * len(ranks) * SKETCH**2 + 2 * _DOUBLE * len(ranks) ** 2
        comparing = one * (1 + momentum) + result + one + (_DOUBLE + _SINGLE) * largest * both + sketches
        rounding = 0
    else:
        comparing = _DOUBLE * (2 * len(ranks) * terms + 2 * len(ranks) ** 2)
    peak = read + stack + square + max(folding, truncating, rounding, comparing)
    return int(peak), int(result + rounded * kept * both * 2)


def _entry_by_entry(aggregation: Aggregation, matrix: MatrixSize) -> tuple[int, int]:
    rows, columns, rank = matrix.rows, matrix.columns, max(matrix.ranks)
    size = _SINGLE * rank * (rows + columns)
    moves = not optimizer.adds_the_mean(aggregation.server)
    moments = optimizer.has_momentum(aggregation.server) + optimizer.has_second_moment(aggregation.server)
    averages = size * (2 + moves + 3 * moments)
    entries = len(matrix.ranks) * rank * max(rows, columns)
    blocks = int(1.5 * max(min(_BLOCK, _DOUBLE * entries), _DOUBLE * len(matrix.ranks) * rank))
    decomposing = 3 * size
    factors = _SINGLE * sum(matrix.ranks) * (rows + columns)
    held = factors if factors <= HELD_BYTES else 0
    return int(averages + held + max(blocks, decomposing)), int(size * (1 + moves + moments))


def _head(size: int, nodes: int) -> int:
    """Return the bytes that a head tensor takes: itself before and after, and blocks of all nodes'."""
    return 2 * _SINGLE * size + min(3 * _BLOCK, 3 * _DOUBLE * nodes * size)
