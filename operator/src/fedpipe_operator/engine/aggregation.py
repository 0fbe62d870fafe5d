# SPDX-License-Identifier: Apache-2.0
"""From a closed round to its global adapter: what the worker is asked, and what of its answer is recorded."""

import time
from pathlib import Path

from fedpipe_api.wire import Blob

from ..aggregate import AggregationRequest, NodeReport, NodeUpdate, StoredFile, aggregate_round
from ..store import Blobs
from .planning import REASON
from .records import MatrixRecord, NodeCheck, RoundAggregated
from .room import available, fitting
from .state import JobState
from .weights import CAP, capped
from .worker import Worker

NORM_HISTORY = 200
"""Update norms that the running median of the checks sees."""


async def aggregate(
    worker: Worker, blobs: Blobs, state: JobState
) -> tuple[RoundAggregated, list[tuple[Path, str]]]:
    """Return the record of the closed round and its new files as (temporary path, digest).

    Raises:
        UserError: it does not fit the operator's memory, or the method cannot aggregate these updates.
    """
    started = time.monotonic()
    request = fitting(request_of(blobs, state), state, available())
    report = await worker.run(state.namespace, aggregate_round, request)
    assert state.current is not None
    counted = weights(state)
    files = [file for file in (report.adapter, report.sent, report.server_state) if file is not None]
    record = RoundAggregated(
        round=state.current.opened.round,
        adapter=_blob(report.adapter),
        sent=_blob(report.sent) if report.sent else None,
        server_state=_blob(report.server_state) if report.server_state else None,
        matrices={name: MatrixRecord(**vars(found)) for name, found in report.matrices.items()},
        checks={node: _check(state, node, found, counted[node]) for node, found in report.nodes.items()},
        relative_error=report.relative_error,
        discarded_energy=report.discarded_energy,
        effective_rank=report.effective_rank,
        seconds=time.monotonic() - started,
    )
    return record, [(file.path, file.digest) for file in files]


def weights(state: JobState) -> dict[str, int]:
    """Return the samples that each update of the current round counts as: its claim, or less (METHOD §4)."""
    assert state.current is not None
    claims = {node: manifest.samples for node, manifest in state.current.updates.items()}
    return {node: int(samples) for node, samples in capped(claims).items()}


def _check(state: JobState, node: str, found: NodeReport, counted: int) -> NodeCheck:
    assert state.current is not None
    check = NodeCheck(**(vars(found) | {"reason": found.reason[:REASON]}))
    claimed = state.current.updates[node].samples
    if counted == claimed:
        return check
    text = f"{claimed} samples counted as {counted}, {CAP:g} times the median of the others'"
    reason = f"{found.reason}; {text}" if found.reason else text
    return check.model_copy(update={"capped": counted, "reason": reason[:REASON]})


def _blob(file: StoredFile) -> Blob:
    return Blob(digest=file.digest, size=file.size)


def request_of(blobs: Blobs, state: JobState) -> AggregationRequest:
    """Return what the closed round asks of the worker; from the ledger alone, so a retry is the same."""
    current, spec = state.current, state.spec
    counted = weights(state)
    assert current is not None
    plan = state.plans[current.opened.plan]
    before = state.rounds.get(current.opened.round - 1)
    result = before.result if before else None
    norms = [
        check.norm
        for number in reversed(state.rounds)
        if (known := state.rounds[number].result) is not None
        for _, check in sorted(known.checks.items())
        if check.verdict == "ok"
    ]
    adapter = result.adapter if result else state.given
    return AggregationRequest(
        aggregation=spec.aggregation,
        alpha=spec.adapter.alpha,
        rs_lora=spec.adapter.rs_lora,
        updates=tuple(
            NodeUpdate(node, blobs.path(manifest.digest), counted[node], plan.nodes[node].ranks)
            for node, manifest in sorted(current.updates.items())
        ),
        directory=blobs.temporary,
        adapter=blobs.path(adapter.digest) if adapter else None,
        as_is=result is None,
        server_state=blobs.path(result.server_state.digest) if result and result.server_state else None,
        norms=tuple(norms[:NORM_HISTORY]),
    )
