# SPDX-License-Identifier: Apache-2.0
"""`spec.privacy`: what a job guarantees each row of a node's data."""

from typing import Literal

from pydantic import Field

from .base import Model


class Privacy(Model):
    """Differential privacy of each row of each node, also against the coordinator (METHOD §6).

    Importance scores, evaluations, losses and counts of rows but their number are withheld.
    """

    level: Literal["record"] = Field(
        default="record", description="What is protected: record is each row of a node's data."
    )
    epsilon: float = Field(gt=0, le=1000, description="Budget of the whole job; smaller protects more.")
    delta: float = Field(
        gt=0, lt=1, description="Chance that epsilon does not hold; at most 1/n of a node's n rows."
    )
    clip_norm: float = Field(
        default=1.0, gt=0, le=1e6, description="Largest norm of one row's gradient; noise is in proportion."
    )
