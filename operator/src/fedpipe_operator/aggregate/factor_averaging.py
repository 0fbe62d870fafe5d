# SPDX-License-Identifier: Apache-2.0
"""A matrix aggregated by averaging its factors entry by entry (METHOD §4)."""

from dataclasses import replace

import numpy as np

from fedpipe_api.lora.codec import Float32
from fedpipe_api.lora.format import LORA_A, LORA_B

from . import server_optimizer as optimizer
from .contribution import Aggregated, Matrix, figures, saved
from .factors import singular_values
from .files import HeldTensors
from .sketches import probed, probed_sum
from .tensor_averaging import Averaged, TensorSource, average

HELD_BYTES = 8 * 2**20
"""A matrix whose factors of all nodes take no more than this is held in memory while it is averaged."""


def average_factors(matrix: Matrix) -> Aggregated:
    """Average the factors of a matrix, padded with zeros to the largest rank; s is folded into B.

    Raises:
        NotFiniteError: an update holds NaN or infinity.
    """
    rows, columns = matrix.shape
    rank = max(part.rank for part in matrix.contributions)
    matrix = _held(matrix)
    previous = saved(matrix.previous, matrix.name, (LORA_A, LORA_B))
    averages = {
        suffix: _average(matrix, suffix, shape, previous)
        for suffix, shape in ((LORA_A, (rank, columns)), (LORA_B, (rows, rank)))
    }
    tensors = {suffix: averaged.new for suffix, averaged in averages.items()}
    state = {
        suffix + kind: tensor
        for suffix, averaged in averages.items()
        for kind, tensor in averaged.state.items()
    }
    sigma = singular_values(tensors[LORA_B], tensors[LORA_A])
    error, energy = _error(matrix, {suffix: averaged.mean for suffix, averaged in averages.items()}, previous)
    found = figures(
        sigma, rank=rank, error=error, reference_energy=energy, discarded=0.0, energy=float(sigma @ sigma)
    )
    products = tuple(averaged.products for suffix, averaged in averages.items() if _known(suffix, previous))
    return Aggregated(tensors, state, products, found)


def _held(matrix: Matrix) -> Matrix:
    """Return the matrix with the nodes' factors in memory if they are small: they are read twice."""
    if 4 * sum(part.rank for part in matrix.contributions) * sum(matrix.shape) > HELD_BYTES:
        return matrix
    names = [matrix.name + suffix for suffix in (LORA_A, LORA_B)]
    held = [replace(part, file=HeldTensors(part.file, names)) for part in matrix.contributions]
    return replace(matrix, contributions=held)


def _known(suffix: str, previous: dict[str, Float32]) -> bool:
    # Before the first average B started from zero, but where A started only the nodes know.
    return suffix == LORA_B or suffix in previous


def _average(matrix: Matrix, suffix: str, shape: tuple[int, int], previous: dict[str, Float32]) -> Averaged:
    # The first ranks of A are a prefix of its entries: A is one column, padded below; B is padded rightward.
    height, width = (shape[0] * shape[1], 1) if suffix == LORA_A else shape
    sources = [
        TensorSource(
            part.node,
            part.file,
            matrix.name + suffix,
            part.rank * shape[1] if suffix == LORA_A else shape[0],
            1 if suffix == LORA_A else part.rank,
            1.0 if suffix == LORA_A else part.scale,
            part.weight,
            part.clip if _known(suffix, previous) else 1.0,
        )
        for part in matrix.contributions
    ]
    stored = saved(matrix.state, matrix.name + suffix, optimizer.SUFFIXES)
    state = {
        kind: tensor if kind == optimizer.STEPS else _resized(tensor, shape).reshape(height, width)
        for kind, tensor in stored.items()
    }
    start = _resized(previous[suffix], shape).reshape(height, width) if suffix in previous else None
    server = matrix.aggregation.server
    found = average(
        sources,
        previous=start,
        shape=(height, width),
        server=server,
        state=state,
    )
    moved = {
        kind: tensor if kind == optimizer.STEPS else tensor.reshape(shape)
        for kind, tensor in found.state.items()
    }
    return Averaged(found.mean.reshape(shape), found.new.reshape(shape), moved, found.products)


def _resized(tensor: Float32, shape: tuple[int, int]) -> Float32:
    """Return a tensor cut or padded with zeros to a shape."""
    if tensor.shape == shape:
        return tensor
    found = np.zeros(shape, np.float32)
    rows, columns = (min(pair) for pair in zip(tensor.shape, shape, strict=True))
    found[:rows, :columns] = tensor[:rows, :columns]
    return found


def _error(matrix: Matrix, mean: dict[str, Float32], previous: dict[str, Float32]) -> tuple[float, float]:
    """Estimate ‖B̄Ā − T‖_F and ‖T‖_F² for T = G + Σ w c D.

    The stack of all factors would give both exactly, at the cost of the aggregation that this method saves.
    """
    target = probed_sum(matrix)
    if previous:
        started = matrix.started(len(previous[LORA_A]))
        target += probed(previous, 1 - (matrix.weights * matrix.clips) @ started)
    return float(np.linalg.norm(probed(mean) - target)), float(np.sum(target * target))
