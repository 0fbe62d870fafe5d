# SPDX-License-Identifier: Apache-2.0
"""What a field without a schema of its own may hold: JSON of bounded depth, number of values and size."""

import json
import math
from typing import Any

DEPTH = 24
"""Levels of nesting. A Pod has at most 14: the values of a label selector in a projected volume."""

VALUES = 2000
"""Values, keys not counted."""

BYTES = 64 * 1024
"""Bytes of all texts and keys as they are stored: in JSON of ASCII, where ä takes six and an emoji twelve.

All of a job must fit into an annotation, which has 256 KiB.
"""

_INTEGER = 2**63


def check_open_json(value: Any) -> None:
    """ValueError, which names no value, for what is not JSON or is beyond the bounds.

    Whatever passes can be written as JSON and read again as it was. It goes level by level, so that no depth
    is too much for it.
    """
    level, depth, values, size = [value], 0, 0, 0
    while level:
        depth += 1
        values += len(level)
        if depth > DEPTH:
            raise ValueError(f"nested deeper than {DEPTH} levels; a Pod needs fewer")
        if values > VALUES:
            raise ValueError(f"more than {VALUES} values; make it smaller")
        size += sum(map(_size, level))
        if size > BYTES:
            raise ValueError(f"more than {BYTES >> 10} KiB; put large texts into a ConfigMap")
        level = [inner for outer in level for inner in _inner(outer)]


def _inner(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _size(value: Any) -> int:
    """Return the bytes of a value's own texts; ValueError for what JSON or Kubernetes does not have."""
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise ValueError("every key must be a text")
        return sum(map(_length, value))
    if isinstance(value, str):
        return _length(value)
    if isinstance(value, bool | list) or value is None:
        return 0
    if isinstance(value, int) and -_INTEGER <= value < _INTEGER:
        return 0
    if isinstance(value, float) and math.isfinite(value):
        return 0
    raise ValueError(
        "holds a value that is neither object, list, text, true, false, null nor a 64-bit number"
    )


def _length(text: str) -> int:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds a text that is not Unicode") from None
    return len(json.dumps(text)) - 2
