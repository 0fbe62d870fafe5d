# SPDX-License-Identifier: Apache-2.0
"""Whether a received file is fit to be used as an update; looked at once, when it arrives."""

import os
from collections.abc import Mapping
from pathlib import Path

from fedpipe_api.lora.codec import DECODED, is_finite
from fedpipe_api.lora.format import Encoding

from .files import MalformedFileError, TensorEntry, read_header

_BLOCK = 1024 * 1024


class InvalidUpdateFile(Exception):
    """A received file that is no usable update: a CamelCase reason, and one line that says what is wrong."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


def check_update_file(path: Path, expected_shapes: Mapping[str, tuple[int, ...]], max_bytes: int) -> None:
    """Check a received file before it counts as an update; reads it once, in blocks of 1 MiB.

    Args:
        path: the file.
        expected_shapes: exactly the tensors it must hold, each float32 or bfloat16.
        max_bytes: its largest length.

    Raises:
        InvalidUpdateFile: TooLarge, Malformed, WrongTensors, WrongType, WrongShape or NotFinite.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        if size > max_bytes:
            raise InvalidUpdateFile("TooLarge", f"the file has {size} bytes, at most {max_bytes} are allowed")
        try:
            entries = read_header(descriptor)
        except MalformedFileError as error:
            raise InvalidUpdateFile("Malformed", f"not a safetensors file: {error}") from None
        _check_layout(entries, expected_shapes)
        _check_finite(descriptor, entries)
    finally:
        os.close(descriptor)


def _check_layout(entries: Mapping[str, TensorEntry], expected: Mapping[str, tuple[int, ...]]) -> None:
    if missing := sorted(expected.keys() - entries.keys()):
        raise InvalidUpdateFile("WrongTensors", f"tensor {missing[0]} is missing ({len(missing)} in all)")
    if surplus := sorted(entries.keys() - expected.keys()):
        raise InvalidUpdateFile(
            "WrongTensors", f"tensor {surplus[0]!r:.80} is not asked for ({len(surplus)} in all)"
        )
    for name, entry in entries.items():
        if entry.dtype not in DECODED:
            raise InvalidUpdateFile(
                "WrongType", f"tensor {name} is {entry.dtype}, {' or '.join(DECODED)} is wanted"
            )
        if entry.shape != tuple(expected[name]):
            raise InvalidUpdateFile(
                "WrongShape", f"tensor {name} is {list(entry.shape)}, not {list(expected[name])}"
            )


def _check_finite(descriptor: int, entries: Mapping[str, TensorEntry]) -> None:
    buffer = bytearray(_BLOCK)
    for name, entry in entries.items():
        position, end, encoding = entry.start, entry.start + entry.size, Encoding(entry.dtype)
        while position < end:
            count = min(_BLOCK, end - position)
            if os.preadv(descriptor, [memoryview(buffer)[:count]], position) != count:
                raise InvalidUpdateFile("Malformed", f"tensor {name} is cut short")
            if not is_finite(memoryview(buffer)[:count], encoding):
                raise InvalidUpdateFile("NotFinite", f"tensor {name} holds NaN or infinity")
            position += count
