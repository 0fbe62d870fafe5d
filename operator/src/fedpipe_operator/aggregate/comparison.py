# SPDX-License-Identifier: Apache-2.0
"""Nodes' changes beside each other: all inner products, from which norms, cosines and distances follow."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .factors import Float64


class NotFiniteError(Exception):
    """The update of the node with this index holds NaN or infinity."""

    def __init__(self, node: int) -> None:
        super().__init__(node)
        self.node = node


@dataclass(frozen=True)
class Products:
    """<D_i, D_j> of one tensor (or matrix) for the nodes that trained it, by their index: (n, n)."""

    nodes: Sequence[int]
    gram: Float64


class Comparison:
    """Inner products of K nodes' changes, summed over tensors; a pair is compared on what both trained.

    `gram` (K, K) holds Σ <D_i, D_j>, `shared` (K, K) what of ‖D_i‖² stands in tensors that j trained too.
    """

    def __init__(self, nodes: int) -> None:
        self.gram, self.shared = np.zeros((nodes, nodes)), np.zeros((nodes, nodes))

    def add(self, products: Products) -> None:
        """Add one tensor."""
        place = np.ix_(products.nodes, products.nodes)
        self.gram[place] += products.gram
        self.shared[place] += np.maximum(0, np.diag(products.gram))[:, None]

    @property
    def norms(self) -> Float64:
        """‖D_k‖ over all tensors: (K,)."""
        return np.sqrt(np.maximum(0, np.diag(self.gram)))

    def cosines(self) -> Float64:
        """Return the cosine of every pair over the tensors that both trained: (K, K), NaN without any."""
        size = np.sqrt(self.shared * self.shared.T)
        known = size > 0
        found = np.where(known, self.gram, np.nan) / np.where(known, size, 1)
        np.fill_diagonal(found, np.nan)
        return np.clip(found, -1, 1)

    def median_cosines(self, others: Sequence[int]) -> Float64:
        """Return the median of each node's cosines to `others`, itself left out: (K,), NaN without any.

        Each of them has one vote, so fewer than half of them decide nothing.
        """
        pairs = self.cosines()[:, others]
        found = np.full(len(pairs), np.nan)
        for node, row in enumerate(pairs):
            known = row[np.isfinite(row)]
            if len(known):
                found[node] = np.median(known)
        return found

    def complete(self) -> Float64:
        """Return inner products as if all had trained all tensors: (K, K).

        A pair agrees on the rest as it agrees on what both trained; a pair that shares nothing is orthogonal.
        """
        squares = np.diag(self.gram)
        share = self.shared + self.shared.T
        found = np.where(share > 0, self.gram * (squares[:, None] + squares), 0) / np.where(
            share > 0, share, 1
        )
        np.fill_diagonal(found, squares)
        return found
