# SPDX-License-Identifier: Apache-2.0
"""Tensor files (the safetensors format) read and written a tensor at a time.

The safetensors package maps whole files into memory, and pages once touched count as resident; with many
large updates that is all of them. Here tensors are read with pread into arrays of their own, and written as
they come. Format: 8 bytes little-endian header length, a JSON header, the tensors without gaps in the order
of the header.
"""

import functools
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fedpipe_api.lora.codec import DECODED, Float32, decode
from fedpipe_api.lora.format import Encoding

from .messages import StoredFile

HEADER_LIMIT = 16 * 1024 * 1024
"""Bytes of the largest header that is read at all; 10,000 matrices need about 3 MB."""

_PREFIX = 8
_BLOCK = 1024 * 1024
_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_NAMES = {np.dtype(np.float32): "F32", np.dtype(np.int8): "I8"}


class MalformedFileError(ValueError):
    """A file that is not in the safetensors format; the message is one line."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file; `start` counts bytes from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def _bytes(array: NDArray[Any]) -> memoryview:
    return memoryview(array.data).cast("B") if array.size else memoryview(b"")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise MalformedFileError("a name stands twice in the header")
    return found


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _entry(name: str, fields: object, base: int) -> TensorEntry:
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise MalformedFileError(f"tensor {name!r:.80} has not exactly dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise MalformedFileError(f"tensor {name!r:.80} has an unknown dtype")
    if not isinstance(shape, list) or len(shape) > 8 or not all(map(_is_count, shape)):
        raise MalformedFileError(f"tensor {name!r:.80} has no valid shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise MalformedFileError(f"tensor {name!r:.80} has no valid data_offsets")
    size = offsets[1] - offsets[0]
    if size != math.prod(shape) * _DTYPES[dtype]:
        raise MalformedFileError(f"tensor {name!r:.80} has offsets that do not fit its shape")
    return TensorEntry(dtype, tuple(shape), base + offsets[0], size)


# Nodes with the same plan send the same header; they share one parsed copy.
@functools.lru_cache(maxsize=64)
def _parse(header: bytes) -> Mapping[str, TensorEntry]:
    try:
        document = json.loads(header.decode(), object_pairs_hook=_unique)
    except MalformedFileError:
        raise
    except (ValueError, RecursionError):
        raise MalformedFileError("the header is not JSON") from None
    if not isinstance(document, dict):
        raise MalformedFileError("the header is not a JSON object")
    document.pop("__metadata__", None)
    base = _PREFIX + len(header)
    return {name: _entry(name, fields, base) for name, fields in document.items()}


def read_header(descriptor: int) -> Mapping[str, TensorEntry]:
    """Return the tensors of an open file by name; its length and layout are checked, its values are not.

    Raises:
        MalformedFileError: it is not a safetensors file, is cut short, or holds bytes that no tensor owns.
    """
    total = os.fstat(descriptor).st_size
    length = int.from_bytes(os.pread(descriptor, _PREFIX, 0), "little")
    if total < _PREFIX or length > min(total - _PREFIX, HEADER_LIMIT):
        raise MalformedFileError("the file does not begin with the length of a safetensors header")
    entries = _parse(os.pread(descriptor, length, _PREFIX))
    end = _PREFIX + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)):
        if entry.start != end:
            raise MalformedFileError(f"tensor {name!r:.80} leaves a gap or overlaps another")
        end += entry.size
    if end != total:
        raise MalformedFileError(f"the header describes {end} bytes, the file has {total}")
    return entries


class TensorFile:
    """A file whose tensors are read one by one; no descriptor stays open between reads."""

    def __init__(self, path: Path) -> None:
        self._path = os.fspath(path)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.entries = read_header(descriptor)
        finally:
            os.close(descriptor)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    @property
    def path(self) -> Path:
        """Where it is stored."""
        return Path(self._path)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self.entries[name].shape

    def read(self, name: str) -> Float32:
        """Return a whole tensor as a float32 array of its own."""
        entry = self.entries[name]
        found = np.empty(entry.shape, np.float32)
        self.read_into(name, 0, found.reshape(-1))
        return found

    def read_into(self, name: str, first: int, target: Float32) -> None:
        """Fill a contiguous vector with the tensor's elements from the `first` on.

        Raises:
            MalformedFileError: the tensor's type is not one of `DECODED`, or the file has become shorter.
        """
        entry = self.entries[name]
        if entry.dtype not in DECODED:
            raise MalformedFileError(
                f"{self._path}: tensor {name} is {entry.dtype}, not {' or '.join(DECODED)}"
            )
        encoding = Encoding(entry.dtype)
        # Float32 needs no copy.
        stored = target if encoding is Encoding.FLOAT32 else np.empty(target.shape, DECODED[encoding])
        self._fill(name, _bytes(stored), entry.start + encoding.width * first)
        decode(stored, encoding, target)

    def elements(self, name: str, first: int, scratch: Float32) -> Float32:
        """Return as many elements as `scratch` has, from the `first` on; read into it where not in memory."""
        self.read_into(name, first, scratch)
        return scratch

    def _fill(self, name: str, view: memoryview, position: int) -> None:
        descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while view:
                count = os.preadv(descriptor, [view], position)
                if not count:
                    raise MalformedFileError(f"{self._path}: tensor {name} is cut short")
                view, position = view[count:], position + count
        finally:
            os.close(descriptor)


class HeldTensors(TensorFile):
    """Some tensors of a file, read once and held in memory."""

    def __init__(self, file: TensorFile, names: Iterable[str]) -> None:
        self._path, self.entries = file._path, file.entries
        self._held = {name: file.read(name) for name in names}

    def read(self, name: str) -> Float32:
        """Return a tensor; callers share it and must not change it."""
        return self._held[name]

    def elements(self, name: str, first: int, scratch: Float32) -> Float32:
        """Return as many elements as `scratch` has, from the `first` on; callers must not change them."""
        return self._held[name].reshape(-1)[first : first + scratch.size]


class TensorWriter:
    """Writes float32 and int8 tensors as they come; a context manager that leaves the outcome in `stored`.

    The header's place is kept free for the given names and filled in at the end, padded with blanks as the
    format allows; `room` makes it as long as that of an earlier file. The same tensors in the same order give
    the same bytes. A failure leaves no file behind.
    """

    def __init__(self, directory: Path, kind: str, names: Iterable[str], room: int | None = None) -> None:
        # 256 bytes hold the longest `:{"dtype":"F32","shape":[…],"data_offsets":[…]},` of up to 8 dimensions.
        self._room = room or -(-(8 + sum(len(json.dumps(name)) + 256 for name in names)) // 8) * 8
        self._entries: dict[str, dict[str, object]] = {}
        self._end = 0
        descriptor, path = tempfile.mkstemp(prefix=f"{kind}-", suffix=".safetensors", dir=directory)
        self._path = Path(path)
        self._file = os.fdopen(descriptor, "w+b", buffering=0)
        self._file.seek(_PREFIX + self._room)
        self.stored: StoredFile

    def __enter__(self) -> Self:
        return self

    def add(self, name: str, tensor: Float32 | NDArray[np.int8]) -> None:
        """Append one tensor."""
        view = _bytes(np.ascontiguousarray(tensor))
        offsets = [self._end, self._end + len(view)]
        self._entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        self._end += len(view)
        self._write(view)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        done = False
        try:
            with self._file:
                if kind is None:
                    self._finish()
                    done = True
        finally:
            if not done:
                self._path.unlink(missing_ok=True)

    def _write(self, view: memoryview) -> None:
        while view:
            view = view[self._file.write(view) :]

    def _finish(self) -> None:
        header = json.dumps(self._entries, separators=(",", ":")).encode()
        assert len(header) <= self._room, "the header outgrew its place"
        self._file.seek(0)
        self._write(memoryview(self._room.to_bytes(_PREFIX, "little") + header.ljust(self._room)))
        os.fsync(self._file.fileno())
        self._file.seek(0)
        digest = hashlib.sha256()
        while block := self._file.read(_BLOCK):
            digest.update(block)
        self.stored = StoredFile(self._path, digest.hexdigest(), self._file.tell())
