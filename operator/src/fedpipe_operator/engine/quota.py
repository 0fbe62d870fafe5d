# SPDX-License-Identifier: Apache-2.0
"""What a job may hold in the store: by its shapes and nodes, and never so much that others find no room."""

from fedpipe_api.lora.format import HEADER_BYTES, trained_bytes

from .state import JobState, kept_blobs

_FILES = 4
"""A round's result: the adapter, what nodes download, and two moments of the server's optimizer."""

_ROUNDS = 3
"""Results that exist at once: of the two latest rounds, and the one that is being made."""


def quota(state: JobState, volume: int) -> int:
    """Return the bytes that the job may hold, updates on their way included.

    It is what a plan of its nodes can need, but at most what its whole namespace may hold on the volume
    (bytes): whatever model a tenant's nodes claim, the other half is for others.
    """
    if state.plan is None or state.model is None:
        return 0
    matrices = [matrix.name for matrix in state.model.matrices]
    ranks, most = state.spec.adapter.ranks.max, state.spec.aggregation.max_global_rank
    update, adapter = (
        trained_bytes(state.model.matrices, state.model.head, dict.fromkeys(matrices, rank)) + HEADER_BYTES
        for rank in (ranks, max(ranks, most))
    )
    return min(_ROUNDS * _FILES * adapter + len(state.plan.nodes) * update, tenant_quota(volume))


def tenant_quota(volume: int) -> int:
    """Return the bytes that all jobs of a namespace may hold together, of a volume of the given bytes."""
    return volume // 2


def held(state: JobState) -> int:
    """Return the bytes of the blobs that the job keeps."""
    return sum(kept_blobs(state).values())
