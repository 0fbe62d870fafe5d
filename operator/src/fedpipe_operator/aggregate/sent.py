"""The global adapter as nodes receive it: int8 factors, a scale for each component, a quarter of the bytes.

Nothing is lost by it: a node's change is counted from what the node received, and G itself stays float32.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpipe_api.wire import LORA_B, SCALE

from .files import Float32

_LARGEST = 127


def quantize(factors: Mapping[str, Float32]) -> dict[str, NDArray[Any]]:
    """Return the tensors to send of a matrix's factors, by suffix.

    Args:
        factors: B (d, R) and A (R, c); none where the matrix has no increment.

    Returns:
        For each factor its int8 values and their float32 scales (R,): a component's largest becomes 127.
    """
    found: dict[str, NDArray[Any]] = {}
    for suffix, factor in factors.items():
        axis = _along(suffix)
        scales = (np.abs(factor).max(axis=axis, keepdims=True, initial=0) / _LARGEST).astype(np.float32)
        found[suffix] = np.rint(factor / np.where(scales > 0, scales, 1)).astype(np.int8)
        found[suffix + SCALE] = scales.reshape(-1)
    return found


def received(factors: Mapping[str, Float32]) -> dict[str, Float32]:
    """Return factors as a node has them after `quantize`: (d, R) and (R, c), float32."""
    sent = quantize(factors)
    return {suffix: sent[suffix] * np.expand_dims(sent[suffix + SCALE], _along(suffix)) for suffix in factors}


def _along(suffix: str) -> int:
    """Return the axis along which a component lies: they are the columns of B, the rows of A."""
    return 0 if suffix == LORA_B else 1
