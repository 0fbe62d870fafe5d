# SPDX-License-Identifier: Apache-2.0
"""`fedpipe-operator track`: sends a job's rounds to its trackers, in the job's namespace, until it has ended.

Ends with the first failure of a tracker: the kubelet starts it again, later each time, and it goes on after
the last round that was sent.
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from fedpipe_api.base import UserError, explain
from fedpipe_api.tracking import MLflow

from ..tracking.page import PAGE_BYTES, Page
from ..tracking.trackers import MLflowRun, Subject, TensorBoard, Tracker, Trackers
from .own_requests import OWN_ROUNDS_PATH, Away, Coordinator

log = logging.getLogger(__name__)

POLL_SECONDS = 10.0
"""Pause between two looks for new rounds."""

REQUEST_SECONDS = 60.0


@dataclass(frozen=True)
class Targets:
    """Where rounds are sent: a directory for event files, an MLflow server and its experiment, or both."""

    tensorboard: Path | None
    mlflow: str | None
    experiment: str | None

    def trackers(self, subject: Subject) -> Trackers:
        """Return the job's trackers; UserError names one that cannot be used."""
        found: list[Tracker] = []
        if self.tensorboard is not None:
            found.append(TensorBoard(self.tensorboard, subject.uid))
        if self.mlflow is not None:
            found.append(MLflowRun(MLflow(uri=self.mlflow, experiment=self.experiment), subject))
        return Trackers(found)


def track(coordinator: Coordinator, targets: Targets) -> None:
    """Send rounds until the job has ended and all are sent. UserError says what keeps one from being sent."""
    after, trackers = -1, None
    while True:
        try:
            page = _fetch(coordinator, after)
        except Away as error:
            log.warning("%s; trying again", error)
            time.sleep(POLL_SECONDS)
            continue
        if trackers is None:
            trackers = targets.trackers(page.subject)
        trackers.send(page.rounds, page.times)
        if page.phase is not None:
            trackers.end(page.phase)
        for place, why in trackers.failed.items():
            raise UserError(f"{place}: {why}")
        if page.phase is not None:
            return
        after = max((row["round"] for row in page.rounds), default=after)
        if not page.more:
            time.sleep(POLL_SECONDS)


def _fetch(coordinator: Coordinator, after: int) -> Page:
    path = f"{OWN_ROUNDS_PATH}?after={after}"
    body = coordinator.get(path, limit=PAGE_BYTES, seconds=REQUEST_SECONDS)
    try:
        return Page.model_validate_json(body)
    except ValidationError as error:
        raise UserError(f"{coordinator.url}{path}: {explain(error)}") from None
