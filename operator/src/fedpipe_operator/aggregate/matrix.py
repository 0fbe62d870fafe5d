"""One matrix of a round: what its aggregation gets and gives, whatever the method."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedpipe_api.job import Aggregation
from fedpipe_api.wire import LORA_A, LORA_B

from .comparison import Products
from .factors import Float64, effective_rank
from .files import Float32, TensorFile
from .messages import MatrixReport

_SPECTRUM, _PROBES = 16, 8

SKETCH = 64
"""Random vectors on either side through which the changes of folded nodes are compared."""


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


@functools.cache
def probes(columns: int) -> Float32:
    """Return a fixed Gaussian matrix Ω (columns, 8) with E‖XΩ‖_F² = ‖X‖_F²."""
    drawn = np.random.default_rng(0).standard_normal((columns, _PROBES)) / np.sqrt(_PROBES)
    found: Float32 = drawn.astype(np.float32)
    return found


@functools.cache
def _sketch(length: int, seed: int) -> Float64:
    """Return a fixed Gaussian matrix (length, p) that keeps inner products on average; p = 64."""
    found: Float64 = np.random.default_rng(seed).standard_normal((length, SKETCH)) / SKETCH**0.5
    return found


def sketched(rows: Float64, side: int) -> Float64:
    """Return vectors (k, n) seen through 64 random ones, or as they are if they are no longer than that."""
    return rows if rows.shape[1] <= SKETCH else rows @ _sketch(rows.shape[1], side)


def probed_sum(matrix: Matrix) -> Float64:
    """Return (Σ w c s B A) Ω: (d, 8), reading the updates one by one."""
    omega = probes(matrix.shape[1])
    found = np.zeros((matrix.shape[0], _PROBES))
    for part in matrix.contributions:
        right = part.file.read(matrix.name + LORA_A) @ omega
        product = part.file.read(matrix.name + LORA_B) @ right
        found += part.weight * part.clip * part.scale * product.astype(np.float64)
    return found


def probed(stored: Mapping[str, Float32], coefficients: Float64 | None = None) -> Float64:
    """Return (B diag(z) A) Ω of a stored product: (d, 8)."""
    right = (stored[LORA_A] @ probes(stored[LORA_A].shape[1])).astype(np.float64)
    return stored[LORA_B].astype(np.float64) @ (
        right if coefficients is None else coefficients[:, None] * right
    )


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
