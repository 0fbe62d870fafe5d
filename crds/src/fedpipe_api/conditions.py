# SPDX-License-Identifier: Apache-2.0
"""Kubernetes conditions: their shape, types and reasons."""

from collections.abc import Iterable
from datetime import datetime
from enum import StrEnum
from typing import Literal, NamedTuple

from pydantic import Field

from .base import Model


class Condition(Model):
    """One metav1.Condition, keyed by `type` in its list."""

    type: str = Field(max_length=316, description="What the condition is about.")
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it holds.")
    reason: str = Field(
        min_length=1,
        max_length=1024,
        pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$",
        description="Why, as one CamelCase word.",
    )
    message: str = Field(default="", max_length=32768, description="Why, for a person.")
    last_transition_time: datetime = Field(description="When the status last changed.")
    observed_generation: int | None = Field(
        default=None, ge=0, description="Generation of the spec it speaks of."
    )


ACCEPTED, PLANNED, OUTPUT, TRACKED = "Accepted", "Planned", "Output", "Tracked"
READY, RECONCILING, STALLED = "Ready", "Reconciling", "Stalled"
"""As kstatus reads them: in the end ready, until then on the way, or standing still until somebody acts."""

COMPLETE, FAILED = "Complete", "Failed"
"""How a job ended, as those of a batch/v1 Job."""


class Reason(StrEnum):
    """Every reason a condition or an Event of a FedPipeJob can carry."""

    ACCEPTED = "Accepted"
    INVALID = "Invalid"
    PLANNED = "Planned"
    PLAN_INFEASIBLE = "PlanInfeasible"
    NO_MATCHING_NODES = "NoMatchingNodes"
    NOT_ENOUGH_NODES = "NotEnoughNodes"
    WAITING_FOR_AGENTS = "WaitingForAgents"
    MODEL_DIFFERS = "ModelDiffers"
    PROFILING = "Profiling"
    IMPORTANCE_INVALID = "ImportanceInvalid"
    ROUND_OPEN = "RoundOpen"
    ROUND_DONE = "RoundDone"
    AGGREGATING = "Aggregating"
    QUORUM_LOST = "QuorumLost"
    STRAGGLER = "Straggler"
    AGENT_LOST = "AgentLost"
    AGENT_RETURNED = "AgentReturned"
    AGENT_FAILED = "AgentFailed"
    POLICY_FORBIDS = "PolicyForbids"
    UPDATE_FLAGGED = "UpdateFlagged"
    UPDATE_REJECTED = "UpdateRejected"
    REPLANNED = "Replanned"
    SUSPENDED = "Suspended"
    RESUMED = "Resumed"
    TARGET_REACHED = "TargetReached"
    NO_IMPROVEMENT = "NoImprovement"
    ROUNDS_COMPLETED = "RoundsCompleted"
    PRIVACY_BUDGET_SPENT = "PrivacyBudgetSpent"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    STORE_FULL = "StoreFull"
    INTERNAL_ERROR = "InternalError"
    STORE_DAMAGED = "StoreDamaged"
    QUARANTINED = "Quarantined"
    OUTPUT_WRITTEN = "OutputWritten"
    OUTPUT_FAILED = "OutputFailed"
    TRACKING = "Tracking"
    ROUNDS_TRACKED = "RoundsTracked"
    TRACKING_FAILED = "TrackingFailed"


class Advice(NamedTuple):
    """What a reason means and what a person does about it; an empty action means nothing is needed."""

    meaning: str
    action: str = ""


ADVICE: dict[Reason, Advice] = {
    Reason.ACCEPTED: Advice("The spec is valid and the job is in the ledger."),
    Reason.INVALID: Advice(
        "The spec is well-formed but cannot be run, for example with an unknown architecture.",
        "Read the message, correct the named field and apply again; immutable fields need another job.",
    ),
    Reason.PLANNED: Advice("Every chosen node has its precision, batch and ranks."),
    Reason.PLAN_INFEASIBLE: Advice(
        "No plan lets enough nodes carry the model within memory and round deadline.",
        "Lower adapter.ranks.min, data.maxLength or rounds.localSteps, raise rounds.deadline, or add nodes; "
        "`fedpipe plan` shows what limits each node.",
    ),
    Reason.NO_MATCHING_NODES: Advice(
        "nodes.selector matches no FedPipeNode that may be used.",
        "Compare the selector with `kubectl get nodes --show-labels` and `kubectl get fedpipenodes`; "
        "the message says why each node was left out.",
    ),
    Reason.NOT_ENOUGH_NODES: Advice(
        "Fewer nodes fit than nodes.min asks for.",
        "Lower nodes.min, free memory on the nodes named in the message, or add nodes.",
    ),
    Reason.WAITING_FOR_AGENTS: Advice(
        "Agent Pods were created and have not all registered.",
        "If it lasts, see `kubectl describe pod -l fedpipe.io/job=JOB` for its image, volume or node.",
    ),
    Reason.MODEL_DIFFERS: Advice(
        "The nodes have different models, and none is that of more than half of them.",
        "Put the same model where spec.model points on every node, or exclude the wrong nodes by "
        "nodes.selector; the message names them and the field that differs.",
    ),
    Reason.PROFILING: Advice("Nodes measure memory, time and the importance of weight matrices."),
    Reason.IMPORTANCE_INVALID: Advice(
        "Importance scores are missing, equal or not finite, so the selection would be arbitrary.",
        "Raise adapter.selection.warmupSteps, or set adapter.selection.mode to all.",
    ),
    Reason.ROUND_OPEN: Advice("A round is running."),
    Reason.ROUND_DONE: Advice("A round closed and its adapter is durable."),
    Reason.AGGREGATING: Advice("Accepted updates are being merged."),
    Reason.QUORUM_LOST: Advice(
        "Fewer nodes are left than rounds.minUpdates; the round waits for them.",
        "Bring the nodes named in the message back; the job goes on by itself.",
    ),
    Reason.STRAGGLER: Advice(
        "A node's update came after the round had closed; it was not counted.",
        "Nothing: the node gets fewer steps. If it repeats, raise rounds.deadline or exclude the node.",
    ),
    Reason.AGENT_LOST: Advice(
        "An agent gave no sign of life for too long.",
        "Look at its Pod, its node and the network to the coordinator.",
    ),
    Reason.AGENT_RETURNED: Advice("A lost agent is back."),
    Reason.AGENT_FAILED: Advice(
        "An agent ended with an error; the message carries its last line.",
        "Fix what the message names (data file, model path, memory). The Pod is replaced by itself; one that "
        "ended with exit status 2 only after you delete it or edit the job.",
    ),
    Reason.POLICY_FORBIDS: Advice(
        "The policy of a node forbids the job there, or its privacy budget is spent; the others go on.",
        "Ask for what the field named in the message allows, or talk to the owner of the node's data; then "
        "delete the Pod or create another job.",
    ),
    Reason.UPDATE_FLAGGED: Advice(
        "An update's norm or direction is out of line with the others; it was counted.",
        "Check the data and hardware of the node; aggregation.checks.mode reject keeps such updates out.",
    ),
    Reason.UPDATE_REJECTED: Advice(
        "An update was refused: not finite, of the wrong shape, or caught by aggregation.checks.",
        "Check the data and hardware of the node; loosen aggregation.checks if it is an honest outlier.",
    ),
    Reason.REPLANNED: Advice("What a node measured broke its plan, so it carries another share from now on."),
    Reason.SUSPENDED: Advice(
        "spec.suspend is true; agents are gone, all state is kept.", "Set suspend to false."
    ),
    Reason.RESUMED: Advice("The job goes on with the round it stopped in."),
    Reason.TARGET_REACHED: Advice("rounds.until.reaches was met; the job ended early."),
    Reason.NO_IMPROVEMENT: Advice(
        "rounds.until.patience rounds passed without a better metric; the job ended early."
    ),
    Reason.ROUNDS_COMPLETED: Advice(
        "All rounds are done.", "Nothing. To train longer, raise rounds.count before the last round ends."
    ),
    Reason.PRIVACY_BUDGET_SPENT: Advice(
        "Another round would take nodes past spec.privacy.epsilon; the rounds done stand.",
        "For more rounds create another job with a larger epsilon, or fewer rounds.localSteps.",
    ),
    Reason.DEADLINE_EXCEEDED: Advice(
        "The job ran longer than activeDeadlineSeconds and failed.",
        "Raise activeDeadlineSeconds in another job; the last adapter stays available.",
    ),
    Reason.INTERNAL_ERROR: Advice(
        "A step of the job failed unexpectedly and is tried again every few seconds.",
        "Look at the operator's log; report it with the message if it lasts.",
    ),
    Reason.STORE_FULL: Advice(
        "The operator's volume has no room for another update.",
        "Enlarge the volume or delete finished jobs; the job goes on by itself.",
    ),
    Reason.STORE_DAMAGED: Advice(
        "A file of the job in the operator's store is damaged or missing and cannot be computed again.",
        "Restore a backup of the store (`fedpipe-operator restore`), or delete the job and start it again; "
        "nothing damaged is used.",
    ),
    Reason.QUARANTINED: Advice(
        "A record of the job in the operator's ledger cannot be read; the job stands still, others run.",
        "Restore a backup of the store (`fedpipe-operator restore`), or delete the job and start it again; "
        "its records and files are kept until then.",
    ),
    Reason.OUTPUT_WRITTEN: Advice("The adapter is stored at spec.output."),
    Reason.OUTPUT_FAILED: Advice(
        "The adapter is in the operator's store but could not be written to spec.output.",
        "Fix the volume, URL or Secret named in the message; `fedpipe get adapter` works meanwhile.",
    ),
    Reason.TRACKING: Advice("Each round is sent to spec.tracking once the next has evaluated it."),
    Reason.ROUNDS_TRACKED: Advice("All rounds of the job, which has ended, are with spec.tracking."),
    Reason.TRACKING_FAILED: Advice(
        "A Pod in the job's namespace cannot send rounds to spec.tracking; the job itself goes on.",
        "Fix the volume, server or Secret named in the message; what is missing is then sent by itself.",
    ),
}
"""What each reason means; the troubleshooting tables are written from it."""


def set_condition(conditions: Iterable[Condition], new: Condition) -> tuple[Condition, ...]:
    """Return the conditions with `new` in place of its type; the transition time moves with the status."""
    kept = []
    placed = False
    for old in conditions:
        if old.type != new.type:
            kept.append(old)
            continue
        placed = True
        if old.status == new.status:
            new = new.model_copy(update={"last_transition_time": old.last_transition_time})
        kept.append(new)
    return tuple(kept) if placed else (*kept, new)
