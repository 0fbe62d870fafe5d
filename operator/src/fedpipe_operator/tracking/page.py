# SPDX-License-Identifier: Apache-2.0
"""The rounds of a job as its tracker Pod fetches them, page by page."""

from itertools import takewhile
from typing import Any

from pydantic import Field

from fedpipe_api.base import Model
from fedpipe_api.job import FedPipeJobSpec, Phase

from ..engine.state import JobState
from . import rows
from .trackers import Subject, parameters

NODE_ROWS = 200
"""Rows of nodes on a page, or one round: it is made between two other answers, in ten milliseconds."""

PAGE_BYTES = 64 << 20
"""A page is never larger: a round of ten thousand nodes has less than a kilobyte of each."""


class Page(Model):
    """Rounds of a job, in order.

    `times` are seconds since the epoch. `phase` is how the job ended, where these are its last rounds.
    """

    subject: Subject
    rounds: tuple[dict[str, Any], ...]
    times: dict[int, float]
    more: bool = Field(description="Whether there are rounds after these.")
    phase: Phase | None = None


def page(state: JobState, after: int) -> Page:
    """Return the rounds after a given one that nothing will be added to: the next round evaluates a round."""
    known = rows.numbers(state)
    complete = known if state.finished else known[:-1]
    wanted = [number for number in complete if number > after]
    room = NODE_ROWS

    def fits(number: int) -> bool:
        nonlocal room
        room -= len(state.rounds[number].opened.participants) if number else 1
        return room >= 0

    taken = [*wanted[:1], *takewhile(fits, wanted[1:])]
    more = len(taken) < len(wanted)
    return Page(
        subject=_subject(state),
        rounds=tuple(rows.row(state, number) for number in taken),
        times={number: rows.time_of(state, number) for number in taken},
        more=more,
        phase=state.finished.phase if state.finished and not more else None,
    )


def _subject(state: JobState) -> Subject:
    nodes = len(state.plan.nodes) if state.plan else 0
    about = parameters(state.spec, _model_name(state.spec), nodes)
    return Subject(uid=state.uid, name=state.name, parameters=dict(about))


def _model_name(spec: FedPipeJobSpec) -> str:
    model = spec.model
    if model.hugging_face is not None:
        return model.hugging_face.name
    if model.host_path is not None:
        return model.host_path.path
    assert model.persistent_volume_claim is not None
    return f"claim {model.persistent_volume_claim.claim_name}/{model.persistent_volume_claim.path}".rstrip(
        "/"
    )
