"""What the ledger records: everything that happened to a job, in order. The state is a fold over these."""

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from fedpipe_api.base import Model
from fedpipe_api.job import FedPipeJobSpec
from fedpipe_api.status import Phase
from fedpipe_api.wire import (
    Blob,
    DeviceFacts,
    Evaluation,
    ModelShape,
    NodePlan,
    ProfileReport,
    UpdateManifest,
)


class Submitted(Model):
    """The job was accepted."""

    kind: Literal["submitted"] = "submitted"
    namespace: str
    name: str
    generation: int
    spec: FedPipeJobSpec

    @property
    def key(self) -> str:
        """Unique within the job."""
        return "submitted"


class SpecChanged(Model):
    """The user edited the spec (suspend, a longer count, …)."""

    kind: Literal["spec"] = "spec"
    generation: int
    spec: FedPipeJobSpec

    @property
    def key(self) -> str:
        """Unique within the job."""
        return f"spec/{self.generation}"


class Offered(Model):
    """The nodes that may take part from now on, and why others may not."""

    kind: Literal["offered"] = "offered"
    sequence: int
    nodes: tuple[str, ...]
    excluded: dict[str, str] = Field(default_factory=dict)

    @property
    def key(self) -> str:
        """Unique within the job."""
        return f"offered/{self.sequence}"


class AgentRegistered(Model):
    """An agent presented itself, for the first time or anew. The model shape is kept from the first only."""

    kind: Literal["registered"] = "registered"
    sequence: int
    node: str
    device: DeviceFacts
    samples: int
    evaluation_samples: int
    model: ModelShape | None = None

    @property
    def key(self) -> str:
        """Unique within the job."""
        return f"registered/{self.sequence}"


class AgentLost(Model):
    """An agent is gone; rounds do not wait for it until it registers again."""

    kind: Literal["lost"] = "lost"
    sequence: int
    node: str
    reason: str

    @property
    def key(self) -> str:
        """Unique within the job."""
        return f"lost/{self.sequence}"


class PlanMade(Model):
    """What every node carries from the next round on."""

    kind: Literal["plan"] = "plan"
    version: int
    reason: str
    nodes: dict[str, NodePlan]
    left_out: dict[str, str]
    selected: tuple[str, ...]
    scores: dict[str, float] = Field(default_factory=dict)
    # Members that the plan knew, so that a newcomer is told from one that was left out.
    considered: tuple[str, ...]

    @property
    def key(self) -> str:
        """Unique within the job."""
        return f"plan/{self.version}"


class Profiled(Model):
    """A node's measurement, and its share of the importance scores."""

    kind: Literal["profiled"] = "profiled"
    node: str
    report: ProfileReport

    @property
    def key(self) -> str:
        """Unique within the job."""
        return f"profiled/{self.node}"


class RoundOpened(Model):
    """A round began: who takes part, from which adapter, until when (seconds since the epoch)."""

    kind: Literal["opened"] = "opened"
    round: int
    plan: int
    participants: tuple[str, ...]
    deadline: float

    @property
    def key(self) -> str:
        """Unique within the job."""
        return f"opened/{self.round}"


class UpdateAccepted(Model):
    """A node's update is durable and counts."""

    kind: Literal["update"] = "update"
    round: int
    node: str
    manifest: UpdateManifest

    @property
    def key(self) -> str:
        """Unique within the job: a node counts once a round."""
        return f"update/{self.round}/{self.node}"


class Evaluated(Model):
    """A node evaluated the global adapter of a round."""

    kind: Literal["evaluated"] = "evaluated"
    node: str
    evaluation: Evaluation

    @property
    def key(self) -> str:
        """Unique within the job."""
        return f"evaluated/{self.evaluation.round}/{self.node}"


class RoundClosed(Model):
    """No more updates of this round count. `stragglers` had none: the steps that were last heard of."""

    kind: Literal["closed"] = "closed"
    round: int
    stragglers: dict[str, int]
    bytes_down: int

    @property
    def key(self) -> str:
        """Unique within the job."""
        return f"closed/{self.round}"


class NodeCheck(Model):
    """What aggregation found of one update."""

    norm: float
    cosine: float | None = None
    verdict: Literal["ok", "clipped", "flagged", "rejected"]
    reason: str


class MatrixReport(Model):
    """What aggregation reports of one matrix."""

    relative_error: float
    discarded_energy: float
    effective_rank: float
    rank: int
    spectrum: tuple[float, ...] = ()


class RoundAggregated(Model):
    """The round's global adapter is durable."""

    kind: Literal["aggregated"] = "aggregated"
    round: int
    adapter: Blob
    sent: Blob | None = None
    server_state: Blob | None = None
    matrices: dict[str, MatrixReport]
    checks: dict[str, NodeCheck]
    relative_error: float
    discarded_energy: float
    effective_rank: float
    seconds: float

    @property
    def key(self) -> str:
        """Unique within the job."""
        return f"aggregated/{self.round}"


class Finished(Model):
    """The job ended."""

    kind: Literal["finished"] = "finished"
    phase: Literal[Phase.SUCCEEDED, Phase.FAILED]
    reason: str
    message: str

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
    | PlanMade
    | Profiled
    | RoundOpened
    | UpdateAccepted
    | Evaluated
    | RoundClosed
    | RoundAggregated
    | Finished
)
ADAPTER: TypeAdapter[Record] = TypeAdapter(Annotated[Record, Field(discriminator="kind")])
