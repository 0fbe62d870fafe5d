# SPDX-License-Identifier: Apache-2.0
"""What the operator reports of a FedPipeJob."""

from datetime import datetime
from enum import StrEnum
from typing import Annotated

from pydantic import AfterValidator, Field

from .base import Model, ModuleName, Name, keyed
from .conditions import Condition
from .precisions import Precision

Figure = Annotated[float, AfterValidator(lambda value: float(f"{value:.4g}"))]
"""A number kept to the four significant digits that a printer column can show."""


class Phase(StrEnum):
    """Where a job stands."""

    PENDING = "Pending"
    PLANNING = "Planning"
    PROFILING = "Profiling"
    TRAINING = "Training"
    AGGREGATING = "Aggregating"
    SUSPENDED = "Suspended"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"

    @property
    def terminal(self) -> bool:
        """Whether nothing more will happen."""
        return self in (Phase.SUCCEEDED, Phase.FAILED)


class Metric(Model):
    """The evaluation metric of the latest evaluated round and the best, to four significant digits."""

    name: str = Field(max_length=64, description="accuracy, loss or perplexity.")
    value: Figure = Field(description="After the latest evaluated round.")
    best: Figure = Field(description="Best so far.")
    best_round: int = Field(ge=0, description="Round of the best.")


class NodeCounts(Model):
    """How many nodes matched, were planned, and answer."""

    matched: int = Field(ge=0, description="Nodes that the selector matches.")
    planned: int = Field(ge=0, description="Nodes that take part.")
    ready: int = Field(ge=0, description="Nodes whose agent answers.")
    summary: str = Field(default="", max_length=32, description="ready/planned, for the printer column.")


class NodeStatus(Model):
    """One node's part in the job."""

    name: Name = Field(description="Name of the node.")
    state: str = Field(max_length=32, description="What the agent does.")
    precision: Precision | None = Field(default=None, description="Precision of the frozen base.")
    micro_batch: int | None = Field(default=None, description="Samples of one forward pass.")
    accumulation: int | None = Field(default=None, description="Forward passes of one optimizer step.")
    matrices: int | None = Field(default=None, description="Matrices it trains.")
    min_rank: int | None = Field(default=None, description="Lowest rank among them.")
    max_rank: int | None = Field(default=None, description="Highest rank among them.")
    limited_by: str | None = Field(
        default=None, max_length=64, description="What keeps its share from growing."
    )
    predicted_bytes: int | None = Field(default=None, description="Planned peak memory.")
    measured_bytes: int | None = Field(default=None, description="Measured peak memory.")
    predicted_seconds: float | None = Field(default=None, description="Planned time of an optimizer step.")
    measured_seconds: float | None = Field(default=None, description="Measured time of an optimizer step.")
    last_round: int | None = Field(default=None, description="Latest round its update was counted in.")
    train_loss: float | None = Field(default=None, description="Mean training loss of that round.")
    epsilon: float | None = Field(default=None, description="Privacy budget that its rows have spent.")
    skipped_rows: int | None = Field(default=None, description="Rows that could not be used (data.onBadRow).")
    truncated_rows: int | None = Field(default=None, description="Rows cut to data.maxLength.")
    repeated_rows: int | None = Field(default=None, description="Held-out rows that are also train data.")
    numbered_rows: int | None = Field(
        default=None, description="Rows whose class is a number, taken as its place in model.labels."
    )
    message: str | None = Field(
        default=None, max_length=1024, description="Why it was left out, or what it needs."
    )


class RoundStatus(Model):
    """One closed round."""

    round: int = Field(ge=1, description="Number of the round, from 1.")
    updates: int = Field(description="Updates counted.")
    loss: float | None = Field(default=None, description="Evaluation loss (natural log).")
    accuracy: float | None = Field(default=None, description="Share of held-out samples classified right.")
    seconds: float = Field(description="From opening to closing.")
    bytes_up: int = Field(description="Bytes of updates received.")
    bytes_down: int = Field(description="Bytes of adapters sent.")
    relative_error: float | None = Field(
        default=None, description="Of the aggregate against the exact weighted sum (METHOD §4)."
    )
    discarded_energy: float | None = Field(default=None, description="Share of energy lost to maxGlobalRank.")
    effective_rank: float | None = Field(
        default=None, description="Of the global adapter, mean over matrices."
    )
    flagged: tuple[Name, ...] = Field(
        default=(), max_length=100, description="Nodes with suspicious updates."
    )


class MatrixScore(Model):
    """Importance of one weight matrix (METHOD §1)."""

    matrix: ModuleName = Field(description="Full module name.")
    score: float = Field(description="Mean over nodes, weighted by samples.")
    selected: bool = Field(description="Whether it is fine-tuned.")


class AdapterStatus(Model):
    """The finished adapter."""

    digest: str = Field(max_length=71, description="sha256 of its bytes.")
    round: int = Field(description="Round it comes from.")
    path: str | None = Field(default=None, max_length=2048, description="Where it was written.")


class FedPipeJobStatus(Model):
    """What the operator observed."""

    observed_generation: int | None = Field(default=None, description="Generation of the spec it speaks of.")
    phase: Phase = Field(default=Phase.PENDING, description="Where the job stands.")
    message: str = Field(default="", max_length=1024, description="Why, for a person.")
    rounds: str = Field(default="", max_length=32, description="done/count, for the printer column.")
    round: int = Field(default=0, ge=0, description="Rounds closed.")
    nodes: NodeCounts | None = None
    metric: Metric | None = None
    metric_summary: str = Field(default="", max_length=64, description="name=value, for the printer column.")
    eta: str = Field(default="", max_length=32, description="Time to the last round, for the printer column.")
    start_time: datetime | None = Field(default=None, description="When the first agent was wanted.")
    completion_time: datetime | None = Field(default=None, description="When the job succeeded or failed.")
    conditions: tuple[Condition, ...] = Field(
        default=(), max_length=16, json_schema_extra=keyed("type"), description="Latest observations."
    )
    node_table: tuple[NodeStatus, ...] = Field(
        default=(), max_length=200, json_schema_extra=keyed("name"), description="Each node's part."
    )
    history: tuple[RoundStatus, ...] = Field(
        default=(), max_length=50, json_schema_extra=keyed("round"), description="The latest rounds."
    )
    importance: tuple[MatrixScore, ...] = Field(
        default=(), max_length=500, json_schema_extra=keyed("matrix"), description="The highest scores."
    )
    epsilon: float | None = Field(
        default=None, description="Privacy budget spent so far: the largest of the nodes'."
    )
    adapter: AdapterStatus | None = None
