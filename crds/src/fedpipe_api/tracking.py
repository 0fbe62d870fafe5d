# SPDX-License-Identifier: Apache-2.0
"""Where what each round measured is also sent."""

from typing import ClassVar

from pydantic import Field

from .base import Model
from .objects import SecretName, Volume
from .rules import Rule


class MLflow(Model):
    """An MLflow server, or with `fedpipe run` a directory of runs."""

    uri: str = Field(
        max_length=2048,
        # No user and password: the spec is shown in reports.
        pattern=r"^(https?://[A-Za-z0-9.:_-]+(/[A-Za-z0-9._~%/-]*)?|file:///[A-Za-z0-9._~%/-]*)$",
        description="Tracking URI: http(s)://host:port, which a cluster's administrator must allow, or with "
        "`fedpipe run` also file:///directory.",
    )
    experiment: str | None = Field(
        default=None,
        min_length=1,
        max_length=250,
        description="Created if it is not there; default: the job's name.",
    )
    secret_name: SecretName | None = Field(
        default=None,
        description="Secret of the job's namespace with MLFLOW_TRACKING_USERNAME and "
        "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN; `fedpipe run` takes them from its environment.",
    )


class Tracking(Model):
    """Experiment trackers, to compare jobs by; a cluster's own metrics are in Prometheus."""

    tensor_board: bool = Field(
        default=False,
        description="Write event files: in a cluster into `tensorboard_runs/JOB` of volume, with "
        "`fedpipe run` into RUN_DIR/tensorboard.",
    )
    volume: Volume | None = Field(
        default=None,
        description="Where a cluster writes TensorBoard's event files; `fedpipe run` ignores it.",
    )
    mlflow: MLflow | None = None

    rules: ClassVar = (
        Rule(
            field="",
            message="set tensorBoard, give mlflow, or both",
            cel="has(self.mlflow) || (has(self.tensorBoard) && self.tensorBoard)",
            holds=lambda tracking: tracking.tensor_board or tracking.mlflow is not None,
        ),
        Rule(
            field="volume",
            message="is of tensorBoard; set that too",
            cel="!has(self.volume) || (has(self.tensorBoard) && self.tensorBoard)",
            holds=lambda tracking: tracking.volume is None or tracking.tensor_board,
        ),
    )
