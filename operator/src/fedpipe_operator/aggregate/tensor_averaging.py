# SPDX-License-Identifier: Apache-2.0
"""Averages of plain tensors, entry by entry, streamed from many files in float64."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fedpipe_api.job import ServerOptimizer
from fedpipe_api.lora.codec import Float32

from . import server_optimizer as optimizer
from .comparison import NotFiniteError, Products
from .factors import Float64
from .files import TensorFile

# Entries of one block: 4 MiB in float64 over all nodes, so that the passes over it stay in cache.
_BLOCK = 512 * 1024


Statistic = Callable[[Float64], Float64]
"""From changes (K, n) to what they come to, entry by entry: (n,)."""


@dataclass(frozen=True)
class TensorSource:
    """One node's tensor, the upper left `rows` × `width` of the average; its values count times `scale`."""

    node: int
    file: TensorFile
    name: str
    rows: int
    width: int
    scale: float
    weight: float
    clip: float


@dataclass(frozen=True)
class Averaged:
    """The mean (rows, width) and what the server optimizer made of it, with its state's tensors by suffix.

    `products` are those of the changes from `previous`, by the sources' nodes.
    """

    mean: Float32
    new: Float32
    state: dict[str, Float32]
    products: Products


def average(
    sources: Sequence[TensorSource],
    *,
    previous: Float32 | None,
    shape: tuple[int, int],
    server: ServerOptimizer,
    state: dict[str, Float32],
    statistic: Statistic | None = None,
) -> Averaged:
    """Average tensors of different sizes, padded with zeros, and let the server optimizer take its step.

    Args:
        sources: at least one; their weights sum to 1.
        previous: the tensor the nodes started from (rows, width). None before the first average; then there
            is nothing to change yet, and the optimizer does not step.
        shape: rows and width of the average.
        server: the server optimizer.
        state: its tensors of the last step by suffix; empty at first.
        statistic: what takes the place of the weighted mean of the changes; for sources of one size.

    Raises:
        NotFiniteError: a source holds NaN or infinity.
    """
    steps = int(state[optimizer.STEPS][0]) if state else 0
    momentum, second = (
        state.get(kind, np.zeros(shape, np.float32)) for kind in (optimizer.MOMENTUM, optimizer.SECOND_MOMENT)
    )
    stateful = optimizer.has_momentum(server) and previous is not None
    mean = np.empty(shape, np.float32)
    moves = previous is not None and not optimizer.adds_the_mean(server)
    new = np.empty(shape, np.float32) if moves else mean
    moved = np.empty(shape, np.float32) if stateful else momentum
    moved_second = np.empty(shape, np.float32) if optimizer.has_second_moment(server) else second
    gram = np.zeros((len(sources), len(sources)))
    for rows, before, change in _changes(sources, previous, shape, gram, statistic):
        mean[rows] = before + change
        if not moves:
            continue
        step = optimizer.advance(server, steps, second[rows].astype(np.float64), change * change)
        velocity = step.keep * momentum[rows] + step.new * change
        new[rows] = before + step.gain * velocity
        if stateful:
            moved[rows] = velocity
            moved_second[rows] = step.second_moment
    products = Products([source.node for source in sources], gram)
    if not stateful:
        return Averaged(mean, new, state, products)
    kept = {optimizer.MOMENTUM: moved, optimizer.STEPS: np.array([steps + 1], np.float32)}
    if optimizer.has_second_moment(server):
        kept[optimizer.SECOND_MOMENT] = moved_second
    return Averaged(mean, new, kept, products)


def _changes(
    sources: Sequence[TensorSource],
    previous: Float32 | None,
    shape: tuple[int, int],
    gram: Float64,
    statistic: Statistic | None,
) -> Iterator[tuple[slice, Float64 | float, Float64]]:
    """Yield `previous` (zero without one) and the mean's change from it, block of rows by block of rows.

    The inner products of the sources' changes are added to `gram` on the way.
    """
    height, width = shape
    weights = np.array([source.weight for source in sources])
    clips = np.array([source.clip for source in sources])
    step = max(1, _BLOCK // (len(sources) * width))
    buffer = np.empty((len(sources), min(step, height), width))
    scratch = np.empty(buffer[0].size, np.float32)
    for first in range(0, height, step):
        rows = slice(first, min(first + step, height))
        count = rows.stop - first
        block = buffer[:, :count]
        before = None if previous is None else previous[rows].astype(np.float64)
        start = 0.0 if before is None else before
        for index, source in enumerate(sources):
            _load(source, first, block[index], before, scratch)
        flat = block.reshape(len(sources), -1)
        gram += flat @ flat.T
        for source, square in zip(sources, np.diag(gram), strict=True):
            if not np.isfinite(square):
                raise NotFiniteError(source.node)
        if statistic is not None:
            yield rows, start, statistic(flat * clips[:, None]).reshape(count, width)
            continue
        change = ((weights * clips) @ flat).reshape(count, width)
        uncovered = _uncovered(sources, weights, rows, width)
        if before is not None and uncovered is not None:
            change -= uncovered * before
        yield rows, start, change


def _load(source: TensorSource, first: int, block: Float64, before: Float64 | None, scratch: Float32) -> None:
    """Fill a block (rows, width) with the node's change, zero where it has no entries."""
    count = max(0, min(len(block), source.rows - first))
    if count < len(block) or source.width < block.shape[1]:
        block[:] = 0
    sent = source.file.elements(source.name, first * source.width, scratch[: count * source.width])
    inner = block[:count, : source.width]
    # Widened first: numpy's arithmetic over two types takes twice as long.
    inner[...] = sent.reshape(count, source.width)
    if source.scale != 1:
        inner *= source.scale
    if before is not None:
        inner -= before[:count, : source.width]


def _uncovered(sources: Sequence[TensorSource], weights: Float64, rows: slice, width: int) -> Float64 | None:
    """Return the share of weight, entry by entry (or row by row), whose nodes do not hold that entry.

    None where every node holds every entry.
    """
    tall = np.array([source.rows for source in sources])
    wide = np.array([source.width for source in sources])
    if (wide < width).any():
        found: Float64 = weights @ (np.arange(width) >= wide[:, None])
        return found
    if (tall < rows.stop).any():
        found = weights @ (np.arange(rows.start, rows.stop) >= tall[:, None])
        return found[:, None]
    return None
