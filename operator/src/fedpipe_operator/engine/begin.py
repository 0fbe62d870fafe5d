# SPDX-License-Identifier: Apache-2.0
"""The adapter that a job starts from: of another job, or a PEFT directory of this machine."""

from collections.abc import Iterable
from pathlib import Path

from fedpipe_api.base import UserError
from fedpipe_api.wire import Blob

from ..aggregate import StoredFile, convert_given
from ..store import Blobs
from .jobs import Job
from .state import JobState
from .worker import Worker

NO_PATHS = "spec.adapter.from.path: is of `fedpipe run`; in a cluster name a job"
"""What is said where the engine reads no directories of users."""


async def converted(worker: Worker, blobs: Blobs, state: JobState) -> StoredFile:
    """Return a new file with the PEFT directory of spec.adapter.from.path as a global adapter.

    Raises:
        UserError: it does not fit the job's model.
    """
    given, model = state.spec.adapter.from_, state.model
    assert given is not None
    assert given.path is not None
    assert model is not None
    return await worker.run(
        state.namespace, convert_given, Path(given.path), state.spec, model, blobs.temporary
    )


def adapter_of(jobs: Iterable[Job], state: JobState) -> Blob:
    """Return the latest adapter of the job that spec.adapter.from.job names, of the same namespace.

    Raises:
        UserError: there is none, or it is of another model.
    """
    assert state.spec.adapter.from_ is not None
    name = state.spec.adapter.from_.job
    field = f"spec.adapter.from.job: {name}"
    named = (job.state for job in jobs if (job.state.namespace, job.state.name) == (state.namespace, name))
    other = max(
        (found for found in named if found.uid != state.uid),
        key=lambda found: found.submitted_at,
        default=None,
    )
    if other is None:
        raise UserError(f"{field}: no such job in namespace {state.namespace}; it must not be deleted before")
    if other.adapter is None or other.model is None or state.model is None:
        raise UserError(f"{field}: it has no adapter yet; create this job when its first round is done")
    ours, theirs = state.spec, other.spec
    mine, its = (spec.model.hugging_face.repo if spec.model.hugging_face else None for spec in (ours, theirs))
    if mine and its and mine != its:
        raise UserError(f"{field}: its base is {its}, not {mine}")
    # The order of the labels is their index in the head.
    for what, here, there in (
        ("architecture", state.model.architecture, other.model.architecture),
        ("spec.model.labels", ours.model.labels, theirs.model.labels),
        ("candidate matrices", state.model.matrices, other.model.matrices),
        ("head", state.model.head, other.model.head),
    ):
        if here != there:
            raise UserError(f"{field}: it has another {what}; make the jobs' models and modules equal")
    if theirs.aggregation.method.averages_factors:
        raise UserError(
            f"{field}: its aggregation.method {theirs.aggregation.method.name} cannot be continued"
        )
    if theirs.aggregation.max_global_rank > ours.aggregation.max_global_rank:
        least = theirs.aggregation.max_global_rank
        raise UserError(f"{field}: spec.aggregation.maxGlobalRank must be at least {least}, as there")
    return other.adapter
