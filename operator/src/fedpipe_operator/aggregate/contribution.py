# SPDX-License-Identifier: Apache-2.0
"""One matrix of a round: what its aggregation gets from the nodes and gives, whatever the method."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedpipe_api.job import Aggregation
from fedpipe_api.lora.codec import Float32
from fedpipe_api.lora.format import LORA_A, LORA_B

from .comparison import Products
from .factors import Float64, effective_rank
from .files import TensorFile
from .messages import MatrixReport

_SPECTRUM = 16


@dataclass(frozen=True)
class Contribution:
    """One node's part in a matrix; `weight` is its share of the samples of those that trained it."""

    node: int
    file: TensorFile
    rank: int
    weight: float
    clip: float
    scale: float


@dataclass(frozen=True)
class Matrix:
    """One matrix of a round, trained by at least one node."""

    name: str
    contributions: Sequence[Contribution]
    previous: TensorFile | None
    state: TensorFile | None
    aggregation: Aggregation
    rounded: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Rows d and columns c."""
        file = self.contributions[0].file
        return file.shape(self.name + LORA_B)[0], file.shape(self.name + LORA_A)[1]

    @property
    def weights(self) -> Float64:
        """The contributions' weights."""
        return np.array([part.weight for part in self.contributions])

    @property
    def clips(self) -> Float64:
        """The contributions' clips."""
        return np.array([part.clip for part in self.contributions])

    def started(self, rank: int) -> Float64:
        """Return 1 where a node (row) started with a component (column) of G: the best r_k of `rank`."""
        components = np.arange(rank)
        return np.array([components < part.rank for part in self.contributions], np.float64)


def saved(file: TensorFile | None, name: str, suffixes: Sequence[str]) -> dict[str, Float32]:
    """Return those tensors `name` + suffix that a file holds, by suffix."""
    if file is None:
        return {}
    return {suffix: file.read(name + suffix) for suffix in suffixes if name + suffix in file}


@dataclass(frozen=True)
class Figures:
    """A matrix's report, and its weights in totals: ‖T‖_F² of the exact target, ‖M‖_F² before the cut."""

    report: MatrixReport
    reference_energy: float
    energy: float


@dataclass(frozen=True)
class Aggregated:
    """A matrix's new tensors and optimizer state by suffix, products of the nodes' changes, its figures."""

    tensors: dict[str, Float32]
    state: dict[str, Float32]
    products: tuple[Products, ...]
    figures: Figures


def factors(left: Float64, right: Float64) -> dict[str, Float32]:
    """Return the tensors of a product from its left (k, d) and right (k, c) rows."""
    return {LORA_A: right.astype(np.float32), LORA_B: np.ascontiguousarray(left.T, np.float32)}


def figures(
    sigma: Float64, *, rank: int, error: float, reference_energy: float, discarded: float, energy: float
) -> Figures:
    """Return the figures of a matrix whose stored product has the singular values `sigma`."""
    relative = error / reference_energy**0.5 if reference_energy > 0 else 0.0
    report = MatrixReport(
        rank=rank,
        relative_error=relative,
        discarded_energy=discarded,
        effective_rank=effective_rank(sigma),
        spectrum=tuple(sigma[:_SPECTRUM].tolist()),
    )
    return Figures(report, reference_energy, energy)
