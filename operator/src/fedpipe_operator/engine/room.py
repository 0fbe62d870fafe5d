# SPDX-License-Identifier: Apache-2.0
"""The memory that an aggregation may take: what the system allows this process, less what is already held."""

import os
from dataclasses import replace
from pathlib import Path

from fedpipe_api import host_memory
from fedpipe_api.base import UserError

from ..aggregate import AggregationRequest
from ..aggregate.memory import MatrixSize, peak_bytes
from .state import JobState

WORKER = 112 * 2**20
"""Bytes that the worker process holds before it aggregates."""

SPARE = 0.05
"""Share of the limit that is left to what grows meanwhile: requests, caches, the kernel's share of files."""

_MIB = 1 << 20


def fitting(request: AggregationRequest, state: JobState, room: int) -> AggregationRequest:
    """Return the request of a closed round with as many threads as the memory allows.

    Args:
        request: of the round, without a number of threads.
        state: the job.
        room: bytes that the aggregation may take.

    Raises:
        UserError: it does not fit with one thread either.
    """
    matrices, heads = sizes(request, state)
    for threads in range(min(4, len(os.sched_getaffinity(0))), 0, -1):
        needed = peak_bytes(request.aggregation, matrices, heads, len(request.updates), threads)
        if needed <= room:
            return replace(request, threads=threads)
    raise UserError(
        f"aggregating {len(request.updates)} updates needs {needed // _MIB} MiB of memory, and the operator "
        f"has {max(0, room) // _MIB} MiB for it. Raise the operator's memory limit, or lower "
        "spec.adapter.ranks.max, spec.aggregation.maxGlobalRank or spec.nodes.max."
    )


def sizes(request: AggregationRequest, state: JobState) -> tuple[list[MatrixSize], list[int]]:
    """Return the matrices of a round that some node trained, and the entries of each head tensor."""
    assert state.model is not None
    before = max((number for number, found in state.rounds.items() if found.result), default=None)
    result = state.rounds[before].result if before is not None else None
    most = request.aggregation.max_global_rank
    matrices = []
    for matrix in state.model.matrices:
        ranks = [rank for update in request.updates if (rank := update.ranks.get(matrix.name, 0))]
        if ranks:
            known = result.matrices.get(matrix.name) if result else None
            # What no node trained in the last round has no figures, but may have been trained before.
            unknown = most if result or state.given else 0
            previous = known.rank if known else unknown
            matrices.append(MatrixSize(matrix.rows, matrix.columns, ranks, previous))
    return matrices, [tensor.size for tensor in state.model.head]


def available(root: Path = Path("/")) -> int:
    """Return the bytes that an aggregation may take in the worker: never more, however much others hold."""
    status = (root / "proc/self/status").read_text()
    resident = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS:"))
    return int((1 - SPARE) * host_memory.read(root).total) - resident - WORKER
