# SPDX-License-Identifier: Apache-2.0
"""What the ledger records: everything that happened to a job, in order. The state is a fold over these."""

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from fedpipe_api.base import (
    Bytes,
    Count,
    Figure,
    Model,
    ModuleName,
    Moment,
    Name,
    Positive,
    RoundNumber,
    Score,
    Seconds,
    Sha256,
    Text,
    Word,
)
from fedpipe_api.job import FedPipeJobSpec
from fedpipe_api.status import Phase
from fedpipe_api.wire import (
    Blob,
    DataNotes,
    DeviceFacts,
    Evaluation,
    ModelShape,
    NodePlan,
    ProfileReport,
    UpdateManifest,
)

NODES = 5000
"""A job offers no more nodes than spec.nodes.max may say."""

MATRICES = 10_000


def _again(times: int | None) -> str:
    return f"/{times}" if times else ""


class Submitted(Model):
    """The job was accepted."""

    kind: Literal["submitted"] = "submitted"
    namespace: Name
    name: Name
    generation: Count
    spec: FedPipeJobSpec

    @property
    def key(self) -> str:
        """Unique within the job."""
        return "submitted"


class SpecChanged(Model):
    """The user edited the spec (suspend, a longer count, …)."""

    kind: Literal["spec"] = "spec"
    generation: Count
    spec: FedPipeJobSpec

    @property
    def key(self) -> str:
        """Unique within the job."""
        return f"spec/{self.generation}"


class Offered(Model):
    """The nodes that may take part from now on, and why others may not."""

    kind: Literal["offered"] = "offered"
    sequence: Count
    nodes: tuple[Name, ...] = Field(max_length=NODES)
    excluded: dict[Name, Text] = Field(default_factory=dict, max_length=10 * NODES)

    @property
    def key(self) -> str:
        """Unique within the job."""
        return f"offered/{self.sequence}"


class AgentRegistered(Model):
    """An agent presented itself, for the first time or again.

    `shape` is the digest of its model's shape; the shape itself is kept where it is the first of its kind in
    the job. A ledger of schema 0 has no digests: every agent had the first one's shape.
    """

    kind: Literal["registered"] = "registered"
    sequence: Count
    node: Name
    device: DeviceFacts
    samples: Positive
    evaluation_samples: Count
    notes: DataNotes = DataNotes()
    shape: Sha256 | None = None
    model: ModelShape | None = None

    @property
    def key(self) -> str:
        """Unique within the job."""
        return f"registered/{self.sequence}"


class AgentLost(Model):
    """An agent is gone, or `failed` with an error; rounds do not wait for it until it registers again.

    `killed_bytes` is what was planned for one that was killed because it used more memory than it may.
    """

    kind: Literal["lost"] = "lost"
    sequence: Count
    node: Name
    reason: Text
    failed: bool = False
    killed_bytes: Bytes | None = None

    @property
    def key(self) -> str:
        """Unique within the job."""
        return f"lost/{self.sequence}"


class PlanMade(Model):
    """What every node carries from the next round on."""

    kind: Literal["plan"] = "plan"
    version: Positive
    reason: Text
    # The digest of the model's shape that it is made for; a ledger of schema 0 has none.
    shape: Sha256 | None = None
    nodes: dict[Name, NodePlan] = Field(max_length=NODES)
    left_out: dict[Name, Text] = Field(max_length=NODES)
    selected: tuple[ModuleName, ...] = Field(max_length=MATRICES)
    scores: dict[ModuleName, Score] = Field(default_factory=dict, max_length=MATRICES)
    # Members that the plan knew, so that a newcomer differs from one that was left out.
    considered: tuple[Name, ...] = Field(max_length=NODES)
    # Made again before the nodes have measured: they still do.
    unmeasured: bool = False

    @property
    def key(self) -> str:
        """Unique within the job."""
        return f"plan/{self.version}"


class Profiled(Model):
    """A node's measurement, and its share of the importance scores."""

    kind: Literal["profiled"] = "profiled"
    node: Name
    report: ProfileReport

    @property
    def key(self) -> str:
        """Unique within the job."""
        return f"profiled/{self.node}"


class Begun(Model):
    """The global adapter that round 1 starts from was given, and is durable."""

    kind: Literal["begun"] = "begun"
    adapter: Blob

    @property
    def key(self) -> str:
        """Unique within the job."""
        return "begun"


class RoundOpened(Model):
    """A round began: who takes part, from which adapter, until when (seconds since the epoch).

    One that is open may begin `again`, by a later plan: updates of nodes that it asks for the same stay.
    """

    kind: Literal["opened"] = "opened"
    round: RoundNumber
    plan: Positive
    participants: tuple[Name, ...] = Field(max_length=NODES)
    deadline: Moment
    again: Positive | None = None

    @property
    def key(self) -> str:
        """Unique within the job."""
        return f"opened/{self.round}{_again(self.again)}"


class UpdateAccepted(Model):
    """A node's update is durable and counts."""

    kind: Literal["update"] = "update"
    round: RoundNumber
    node: Name
    manifest: UpdateManifest
    # After how many drops of the node's update in this round; none is left out.
    drops: Positive | None = None

    @property
    def key(self) -> str:
        """Unique within the job: a node counts once a round."""
        return f"update/{self.round}/{self.node}{_again(self.drops)}"


class UpdateDropped(Model):
    """An update's bytes in the store are not those that arrived: the round is open again for its node."""

    kind: Literal["dropped"] = "dropped"
    round: RoundNumber
    node: Name
    drops: Positive
    deadline: Moment

    @property
    def key(self) -> str:
        """Unique within the job."""
        return f"dropped/{self.round}/{self.node}/{self.drops}"


class Evaluated(Model):
    """A node evaluated the global adapter of a round."""

    kind: Literal["evaluated"] = "evaluated"
    node: Name
    evaluation: Evaluation

    @property
    def key(self) -> str:
        """Unique within the job."""
        return f"evaluated/{self.evaluation.round}/{self.node}"


class RoundClosed(Model):
    """No more updates of this round count. `stragglers` had none: the steps that were last heard of."""

    kind: Literal["closed"] = "closed"
    round: RoundNumber
    stragglers: dict[Name, Count] = Field(max_length=NODES)
    bytes_down: Bytes
    # After how many drops of updates in this round; none is left out.
    drops: Positive | None = None

    @property
    def key(self) -> str:
        """Unique within the job."""
        return f"closed/{self.round}{_again(self.drops)}"


class NodeCheck(Model):
    """What aggregation found of one update."""

    norm: Figure
    # A cosine that rounding may have moved past one.
    cosine: float | None = Field(default=None, ge=-2, le=2)
    verdict: Literal["ok", "clipped", "flagged", "rejected"]
    reason: Text
    # The samples that it counted as, where the node claimed more than it may (METHOD §4).
    capped: Positive | None = None


class MatrixRecord(Model):
    """What aggregation reports of one matrix."""

    relative_error: Figure
    discarded_energy: Figure
    effective_rank: Figure
    rank: Count
    spectrum: tuple[Figure, ...] = Field(default=(), max_length=16)


class RoundAggregated(Model):
    """The round's global adapter is durable."""

    kind: Literal["aggregated"] = "aggregated"
    round: RoundNumber
    adapter: Blob
    sent: Blob | None = None
    server_state: Blob | None = None
    matrices: dict[ModuleName, MatrixRecord] = Field(max_length=MATRICES)
    checks: dict[Name, NodeCheck] = Field(max_length=NODES)
    relative_error: Figure
    discarded_energy: Figure
    effective_rank: Figure
    seconds: Seconds

    @property
    def key(self) -> str:
        """Unique within the job."""
        return f"aggregated/{self.round}"


class Finished(Model):
    """The job ended."""

    kind: Literal["finished"] = "finished"
    phase: Literal[Phase.SUCCEEDED, Phase.FAILED]
    reason: Word
    message: Text

    @property
    def key(self) -> str:
        """Unique within the job."""
        return "finished"


Record = (
    Submitted
    | SpecChanged
    | Offered
    | AgentRegistered
    | AgentLost
    | Begun
    | PlanMade
    | Profiled
    | RoundOpened
    | UpdateAccepted
    | UpdateDropped
    | Evaluated
    | RoundClosed
    | RoundAggregated
    | Finished
)
ADAPTER: TypeAdapter[Record] = TypeAdapter(Annotated[Record, Field(discriminator="kind")])
