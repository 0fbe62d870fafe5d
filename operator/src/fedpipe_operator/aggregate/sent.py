# SPDX-License-Identifier: Apache-2.0
"""The global adapter as nodes receive it: int8 factors, a scale for each component, a quarter of the bytes.

Nothing is lost by it: a node's change is counted from what the node received, and G itself stays float32.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpipe_api.wire import HEAD, LORA_A, LORA_B, SCALE

from .files import Float32, TensorFile, TensorWriter
from .messages import StoredFile

_LARGEST = 127

_PREFIX = 8
"""Bytes that give the length of a file's header."""


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


def make_again(adapter: Path, size: int, directory: Path) -> StoredFile:
    """Make the file to send of an adapter again; `size` are the bytes that it had."""
    file = TensorFile(adapter)
    tensors: dict[str, NDArray[Any]] = {}
    for name in file.entries:
        tensor = file.read(name)
        suffix = next((end for end in (LORA_A, LORA_B) if name.endswith(end)), None)
        if name.startswith(HEAD) or suffix is None:
            tensors[name] = tensor
        else:
            stem = name.removesuffix(suffix)
            tensors |= {stem + end: found for end, found in quantize({suffix: tensor}).items()}
    room = size - _PREFIX - sum(tensor.nbytes for tensor in tensors.values())
    if room <= 0:
        raise ValueError("the adapter has other tensors than the file that was sent")
    with TensorWriter(directory, "sent", (), room) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    return writer.stored


def received(factors: Mapping[str, Float32]) -> dict[str, Float32]:
    """Return factors as a node has them after `quantize`: (d, R) and (R, c), float32."""
    sent = quantize(factors)
    return {suffix: sent[suffix] * np.expand_dims(sent[suffix + SCALE], _along(suffix)) for suffix in factors}


def _along(suffix: str) -> int:
    """Return the axis of a component's values: components are the columns of B, the rows of A."""
    return 0 if suffix == LORA_B else 1
