# SPDX-License-Identifier: Apache-2.0
"""The shapes of the models that nodes registered: which is the job's, and what its tensors take."""

import hashlib
from collections import Counter
from collections.abc import Iterable

from fedpipe_api.wire import ModelShape

MODELS_PER_NODE = 2
"""Shapes new to the job that one node may bring in its life: the ledger keeps each, up to 1 MiB."""

MODELS = 16
"""Different shapes that a job keeps, those that most nodes have: the largest take 6 MiB of memory each."""


def digest_of(model: ModelShape) -> str:
    """Return the sha256 of a shape; equal shapes have equal digests."""
    return hashlib.sha256(model.to_json().encode()).hexdigest()


def majority(shapes: Iterable[str]) -> str | None:
    """Return the shape that more than half have, or None."""
    counts = Counter(shapes)
    shape, count = counts.most_common(1)[0] if counts else ("", 0)
    return shape if 2 * count > counts.total() else None


def difference(model: ModelShape, other: ModelShape) -> str:
    """Return the first field in which two shapes differ."""
    return next(name for name in ModelShape.model_fields if getattr(model, name) != getattr(other, name))
