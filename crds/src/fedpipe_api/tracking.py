# SPDX-License-Identifier: Apache-2.0
"""Where `fedpipe run` also sends what each round measured."""

from typing import ClassVar

from pydantic import Field

from .base import Model
from .rules import Rule


class MLflow(Model):
    """An MLflow server or directory of runs; credentials come from the environment, as MLflow names them."""

    uri: str = Field(
        max_length=2048,
        # No user and password: the spec is shown in reports.
        pattern=r"^(https?://[A-Za-z0-9.:_-]+(/[A-Za-z0-9._~%/-]*)?|file:///[A-Za-z0-9._~%/-]*)$",
        description="Tracking URI: http(s)://host:port or file:///directory.",
    )
    experiment: str | None = Field(
        default=None,
        min_length=1,
        max_length=250,
        description="Created if it is not there; default: the job's name.",
    )


class Tracking(Model):
    """Experiment trackers, for `fedpipe run`; a cluster's metrics are in Prometheus."""

    tensor_board: bool = Field(default=False, description="Write event files into RUN_DIR/tensorboard.")
    mlflow: MLflow | None = None

    rules: ClassVar = (
        Rule(
            field="",
            message="set tensorBoard, give mlflow, or both",
            cel="has(self.mlflow) || (has(self.tensorBoard) && self.tensorBoard)",
            holds=lambda tracking: tracking.tensor_board or tracking.mlflow is not None,
        ),
    )
