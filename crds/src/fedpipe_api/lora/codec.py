# SPDX-License-Identifier: Apache-2.0
"""The encodings of tensors on the wire: int8 with a scale for each component, and bfloat16."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .format import LORA_A, LORA_B, SCALE, Encoding

Float32 = NDArray[np.float32]

DECODED: dict[Encoding, type[np.generic]] = {Encoding.FLOAT32: np.float32, Encoding.BFLOAT16: np.uint16}
"""The encodings of an update, each with the type of array that its stored values are read into."""

_LARGEST = 127
_EXPONENT = np.uint16(0x7F80)
"""Of a bfloat16, all ones: NaN or infinity."""


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


def dequantize(suffix: str, values: NDArray[np.int8], scales: Float32) -> Float32:
    """Return the factor that a node has of its int8 values and scales, float32."""
    return np.multiply(values, np.expand_dims(scales, _along(suffix)), dtype=np.float32)


def received(factors: Mapping[str, Float32]) -> dict[str, Float32]:
    """Return factors as a node has them after `quantize`: (d, R) and (R, c), float32."""
    sent = quantize(factors)
    return {suffix: dequantize(suffix, sent[suffix], sent[suffix + SCALE]) for suffix in factors}


def decode(stored: NDArray[Any], encoding: Encoding, target: Float32) -> None:
    """Fill a float32 array with stored values; they may be the array itself where they are float32."""
    if encoding is Encoding.BFLOAT16:
        # Each is the upper half of a float32.
        np.left_shift(stored, 16, out=target.view(np.uint32), dtype=np.uint32)
    elif stored is not target:
        target[...] = stored


def is_finite(block: memoryview, encoding: Encoding) -> bool:
    """Return whether a block of stored values has neither NaN nor infinity."""
    stored = np.frombuffer(block, DECODED[encoding])
    if encoding is Encoding.BFLOAT16:
        return bool(((stored & _EXPONENT) != _EXPONENT).all())
    return bool(np.isfinite(stored).all())


def _along(suffix: str) -> int:
    """Return the axis that a component extends along: they are the columns of B, the rows of A."""
    return {LORA_B: 0, LORA_A: 1}[suffix]
