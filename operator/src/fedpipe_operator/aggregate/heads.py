# SPDX-License-Identifier: Apache-2.0
"""A head tensor (or another that is trained whole) of a round, averaged entry by entry (METHOD §4, §5)."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedpipe_api.job import Robust, ServerOptimizer
from fedpipe_api.lora.codec import Float32

from .comparison import NotFiniteError
from .factors import Float64
from .robust import FEWEST, far_norms
from .tensor_averaging import Averaged, Statistic, TensorSource, average

_BLOCK = 512 * 1024
"""Entries of all sources that are looked at together."""


def aggregate_head(
    sources: Sequence[TensorSource],
    *,
    previous: Float32 | None,
    robust: Robust,
    server: ServerOptimizer,
    state: dict[str, Float32],
) -> tuple[Averaged, list[int]]:
    """Average a head tensor, as a vector; return also the nodes whose change of it was clipped.

    A head is small beside the matrices, and so an attack on it alone; under a rule its changes are bounded by
    themselves, from `previous` or, before the first average, from the median of what was sent.

    Args:
        sources: at least one; their weights sum to 1.
        previous: the tensor that nodes started from (size, 1); None before the first average.
        robust: the rule, and what of entries.
        server: the server optimizer.
        state: its tensors by suffix.

    Raises:
        NotFiniteError: a source holds NaN or infinity.
    """
    start, clipped = previous, list[int]()
    if robust.rule == "none":
        sources = sources if previous is not None else [replace(source, clip=1.0) for source in sources]
    else:
        start, sources, clipped = _bounded(sources, previous)
    found = average(
        sources,
        previous=start,
        shape=(sources[0].rows, 1),
        server=server if previous is not None else ServerOptimizer(),
        state=state if previous is not None else {},
        statistic=_statistic(robust, len(sources)),
    )
    return replace(found, state=found.state if previous is not None else state), clipped


def _bounded(
    sources: Sequence[TensorSource], previous: Float32 | None
) -> tuple[Float32, list[TensorSource], list[int]]:
    """Return where changes count from (size, 1), and the sources and nodes clipped where they are far off."""
    size = sources[0].rows
    start = np.empty((size, 1), np.float32) if previous is None else previous
    squares = np.zeros(len(sources))
    step = max(1, _BLOCK // len(sources))
    for first in range(0, size, step):
        values = np.empty((len(sources), min(step, size - first)), np.float32)
        for source, row in zip(sources, values, strict=True):
            source.file.read_into(source.name, first, row)
            if not np.isfinite(row).all():
                raise NotFiniteError(source.node)
        place = slice(first, first + values.shape[1])
        if previous is None:
            start[place, 0] = np.median(values, axis=0)
        squares += np.square(values.astype(np.float64) - start[place, 0]).sum(axis=1)
    norms = np.sqrt(squares)
    far, middle = far_norms(norms)
    if len(sources) < FEWEST or not far.any():
        return start, list(sources), []
    bounded = [
        replace(source, clip=source.clip * middle / norm) if outlying else source
        for source, norm, outlying in zip(sources, norms, far, strict=True)
    ]
    return start, bounded, [source.node for source, outlying in zip(sources, far, strict=True) if outlying]


def _statistic(robust: Robust, nodes: int) -> Statistic | None:
    if robust.head == "median":
        return lambda changes: np.median(changes, axis=0)
    cut = min(int(robust.byzantine * nodes), (nodes - 1) // 2)
    if robust.head == "trimmed-mean" and cut:
        return lambda changes: _trimmed(changes, cut)
    return None


def _trimmed(changes: Float64, cut: int) -> Float64:
    ordered = np.sort(changes, axis=0)
    found: Float64 = ordered[cut : len(changes) - cut].mean(axis=0)
    return found
