# SPDX-License-Identifier: Apache-2.0
"""The global adapter as nodes receive it: int8 factors, a scale for each component, a quarter of the bytes.

Nothing is lost by it: a node's change is counted from what the node received, and G itself stays float32.
"""

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from fedpipe_api.lora.codec import quantize
from fedpipe_api.lora.format import HEAD, LORA_A, LORA_B

from .files import TensorFile, TensorWriter
from .messages import StoredFile

_PREFIX = 8
"""Bytes that give the length of a file's header."""


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
