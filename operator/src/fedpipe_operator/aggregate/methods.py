# SPDX-License-Identifier: Apache-2.0
"""The aggregation rules: one small function a method (METHOD §4), all with the same argument and answer.

`exact`, `truncate` and `stack` work in factor space on G = B·A, kept in SVD form: A's rows orthonormal, B =
U·Σ, σ descending, at most maxGlobalRank of them. D_k is what node k changed: s·B_k·A_k less what it started
from. The three differ in what a node starts from and in what becomes of the components of G. `zero-pad` and
`average` average the factors themselves.
"""

from collections.abc import Callable

import numpy as np

from fedpipe_api.base import UserError
from fedpipe_api.lora.methods import Method

from .contribution import Aggregated, Matrix
from .factor_averaging import average_factors
from .low_rank_sum import sum_products

Rule = Callable[[Matrix], Aggregated]


def exact(matrix: Matrix) -> Aggregated:
    """G ← G + Σ w D; a node starts from the best rank-r_k part of G as sent, the remainder stays frozen."""
    return sum_products(matrix, True, lambda weights, clips, started: -(weights * clips) @ started)


def truncate(matrix: Matrix) -> Aggregated:
    """G ← Σ w s B A (FlexLoRA); a node starts from the best rank-r_k part of G, without the rest."""
    return sum_products(matrix, True, lambda weights, clips, started: (weights * (1 - clips)) @ started - 1)


def stack(matrix: Matrix) -> Aggregated:
    """G ← G + Σ w s B A (FLoRA); a node starts from a fresh adapter beside the frozen G."""
    return sum_products(matrix, False, lambda weights, clips, started: np.zeros(started.shape[1]))


def zero_pad(matrix: Matrix) -> Aggregated:
    """Average the factors, padded with zeros to the largest rank (HetLoRA)."""
    return average_factors(matrix)


def average(matrix: Matrix) -> Aggregated:
    """Average the factors of equal rank (FedIT).

    Raises:
        UserError: the ranks differ.
    """
    ranks = sorted(part.rank for part in matrix.contributions)
    if ranks[0] != ranks[-1]:
        raise UserError(
            f"spec.aggregation.method: average needs equal ranks, but {matrix.name} has ranks {ranks[0]} to "
            f"{ranks[-1]}. Make spec.adapter.ranks.min and max equal, or choose another method."
        )
    return average_factors(matrix)


RULES: dict[Method, Rule] = {
    Method.EXACT: exact,
    Method.TRUNCATE: truncate,
    Method.STACK: stack,
    Method.ZERO_PAD: zero_pad,
    Method.AVERAGE: average,
}
if _missing := sorted(set(Method) - RULES.keys()):
    raise ImportError(f"no rule for the aggregation method {_missing[0]}")
