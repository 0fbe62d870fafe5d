# SPDX-License-Identifier: Apache-2.0
"""Random projections that stand in for products too large to build: of sums, and of nodes' changes."""

import functools
from collections.abc import Mapping

import numpy as np

from fedpipe_api.lora.codec import Float32
from fedpipe_api.lora.format import LORA_A, LORA_B

from .contribution import Matrix
from .factors import Float64

_PROBES = 8

SKETCH = 64
"""Random vectors on either side through which the changes of folded nodes are compared."""


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
        right *= np.float32(part.weight * part.clip * part.scale)
        found += part.file.read(matrix.name + LORA_B) @ right
    return found


def probed(stored: Mapping[str, Float32], coefficients: Float64 | None = None) -> Float64:
    """Return (B diag(z) A) Ω of a stored product: (d, 8)."""
    right = (stored[LORA_A] @ probes(stored[LORA_A].shape[1])).astype(np.float64)
    return stored[LORA_B].astype(np.float64) @ (
        right if coefficients is None else coefficients[:, None] * right
    )
