# SPDX-License-Identifier: Apache-2.0
"""PEFT's tensor file of a global adapter, made while it is read: it takes no file and little memory."""

import json
import math
import os
from collections.abc import Iterator, Mapping

import numpy as np

from fedpipe_api.lora.format import HEAD, LORA_A, LORA_B

from ..aggregate.files import TensorEntry, read_header

CHUNK = 128 * 1024
"""Bytes of a piece, or one row where that is longer: each slow reader holds so many."""

_PREFIX = "base_model.model."

Shape = tuple[int, ...]


def rank_of(shapes: Mapping[str, Shape]) -> int:
    """Return the highest rank of a global adapter's matrices; at least 1, as readers ask."""
    return max([1, *(shape[0] for name, shape in shapes.items() if _is_factor(name, LORA_A))])


def padded_shape(name: str, shape: Shape, rank: int) -> Shape:
    """Return a tensor's shape with its matrix at a rank: lora_A (rank, c), lora_B (d, rank)."""
    if _is_factor(name, LORA_A):
        return (rank, *shape[1:])
    return (*shape[:1], rank) if _is_factor(name, LORA_B) else shape


def padded(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a global adapter whose matrices all have the highest rank; zeros change no product."""
    rank = rank_of({name: tensor.shape for name, tensor in tensors.items()})
    found = {}
    for name, tensor in tensors.items():
        wanted = padded_shape(name, tensor.shape, rank)
        found[name] = np.pad(tensor, [(0, w - h) for w, h in zip(wanted, tensor.shape, strict=True)])
    return found


def matrices_of(shapes: Mapping[str, Shape]) -> list[str]:
    """Return the names of a global adapter's matrices."""
    return sorted(name.removesuffix(LORA_A) for name in shapes if _is_factor(name, LORA_A))


def _is_factor(name: str, ending: str) -> bool:
    return name.endswith(ending) and not name.startswith(HEAD)


class PeftWeights:
    """The file `adapter_model.safetensors` of a global adapter, an open file that others close.

    All matrices get the highest rank, filled up with zeros, which change no product.
    """

    def __init__(self, source: int) -> None:
        self._source = source
        self._tensors = read_header(source)
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        self.rank = rank_of(self.shapes)
        self._header = self._make_header()

    def __len__(self) -> int:
        return len(self._header) + sum(map(self._size, self._tensors))

    def chunks(self) -> Iterator[bytes]:
        """Yield its bytes in pieces that are not empty. Blocks; OSError where the file has become shorter."""
        yield self._header
        for name, tensor in self._tensors.items():
            if _is_factor(name, LORA_B) and tensor.shape[1] < self.rank:
                yield from self._wider(tensor)
                continue
            yield from self._read(tensor, CHUNK)
            zeros = self._size(name) - tensor.size
            while zeros:
                part = min(zeros, CHUNK)
                yield bytes(part)
                zeros -= part

    def _size(self, name: str) -> int:
        tensor = self._tensors[name]
        shape = padded_shape(name, tensor.shape, self.rank)
        return math.prod(shape) * tensor.size // max(1, math.prod(tensor.shape))

    def _wider(self, tensor: TensorEntry) -> Iterator[bytes]:
        """Yield a factor (d, r) row by row with zeros in the columns that it lacks."""
        rows, rank = tensor.shape
        width = tensor.size // rows
        for block in self._read(tensor, max(1, CHUNK // width) * width):
            values = np.frombuffer(block, np.uint8).reshape(-1, width)
            yield np.pad(values, ((0, 0), (0, (self.rank - rank) * (width // rank)))).tobytes()

    def _read(self, tensor: TensorEntry, size: int) -> Iterator[bytes]:
        """Yield a tensor's bytes, so many at a time."""
        for start in range(tensor.start, tensor.start + tensor.size, size):
            wanted = min(size, tensor.start + tensor.size - start)
            block = os.pread(self._source, wanted, start)
            if len(block) != wanted:
                raise OSError("the adapter's file is cut short")
            yield block

    def _make_header(self) -> bytes:
        """Return what the file begins with; lora_A.weight is (R, c), lora_B.weight (d, R)."""
        named: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, tensor in self._tensors.items():
            plain = name.removeprefix(HEAD) if name.startswith(HEAD) else f"{name}.weight"
            begin, end = end, end + self._size(name)
            named[_PREFIX + plain] = {
                "dtype": tensor.dtype,
                "shape": padded_shape(name, tensor.shape, self.rank),
                "data_offsets": [begin, end],
            }
        text = json.dumps(named, separators=(",", ":")).encode()
        text = text.ljust(-(-len(text) // 8) * 8)
        return len(text).to_bytes(8, "little") + text
