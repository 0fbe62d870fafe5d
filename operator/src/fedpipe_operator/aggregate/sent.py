"""The global adapter as nodes receive it: its leading components, in int8 with a scale for each.

Nothing is lost by it: a node's change is counted from what the node received, and G itself keeps all its
components in float32.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpipe_api.wire import LORA_A, LORA_B, SCALE

from .files import Float32, scaled

SENT_ENERGY = 0.99
"""Share of ‖G‖_F² that the leading components sent hold; the others are many, and nearly noise."""
_LARGEST = 127


def quantize(factors: Mapping[str, Float32]) -> dict[str, NDArray[Any]]:
    """Return the tensors to send of a matrix's factors, by suffix.

    Args:
        factors: B (d, R) and A (R, c); none where the matrix has no increment.

    Returns:
        For each factor int8 values and float32 scales (K,) of its K ≤ R leading components: the largest of
        each becomes 127.
    """
    found: dict[str, NDArray[Any]] = {}
    for suffix, factor in _leading(factors).items():
        axis = 0 if suffix == LORA_B else 1
        scales = (np.abs(factor).max(axis=axis, keepdims=True, initial=0) / _LARGEST).astype(np.float32)
        found[suffix] = np.rint(factor / np.where(scales > 0, scales, 1)).astype(np.int8)
        found[suffix + SCALE] = scales.reshape(-1)
    return found


def received(factors: Mapping[str, Float32]) -> dict[str, Float32]:
    """Return factors as a node has them after `quantize`: (d, K) and (K, c), float32."""
    sent = quantize(factors)
    return {suffix: scaled(suffix, sent[suffix], sent[suffix + SCALE]) for suffix in factors}


def _leading(factors: Mapping[str, Float32]) -> Mapping[str, Float32]:
    """Return the fewest components with the energy sent; B is U·Σ, σ falling, A's rows are orthonormal."""
    if not factors:
        return factors
    energy = np.cumsum(np.square(factors[LORA_B], dtype=np.float64).sum(axis=0))
    kept = 1 + int(np.searchsorted(energy, SENT_ENERGY * energy[-1]))
    return {LORA_A: factors[LORA_A][:kept], LORA_B: factors[LORA_B][:, :kept]}
