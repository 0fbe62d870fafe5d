# SPDX-License-Identifier: Apache-2.0
"""Whether a message from an agent is accepted: pure checks against the state.

A message is accepted only if it answers what the node was asked for, in the round it was asked for, and
claims no more work or data than was planned and registered. How much of that counts in a mean is another
matter (`weights`).
"""

from collections import Counter
from enum import Enum

from fedpipe_api.job import Task
from fedpipe_api.lora.format import trained_bytes
from fedpipe_api.wire import (
    LOSS_LIMIT,
    Evaluation,
    ModelShape,
    NodePlan,
    ProfileReport,
    Registration,
    UpdateManifest,
)

from .records import AgentRegistered, RoundOpened
from .shapes import MODELS, MODELS_PER_NODE, difference, digest_of
from .state import JobState

UPDATE_LIMIT = 4 << 30
"""Bytes as float32 of the largest update that a job may ask for."""


class Refused(Exception):
    """A message is not accepted: an HTTP status, a CamelCase reason and one line for people.

    `retry_after` is the time in seconds after which the same message may be welcome.
    """

    def __init__(self, status: int, reason: str, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.message = message
        self.retry_after = retry_after


class Verdict(Enum):
    """What to do with an acceptable message."""

    NEW = "new"
    KNOWN = "known"  # recorded before: answer as then, change nothing


def registration(state: JobState, node: str, message: Registration) -> Verdict:
    """Accept an agent of an offered node with a model that the job could have.

    Another model than the others' is no reason to refuse it before there is a plan: nobody knows yet which
    node is wrong. The plan leaves out the minority.
    """
    if node not in state.offered:
        raise Refused(403, "NotOffered", f"{node} is not a node of job {state.name}")
    _require_possible(state, node, message.model)
    shape = digest_of(message.model)
    if state.plan is not None and node in state.plan.nodes and shape != state.shape:
        assert state.model is not None
        field = difference(message.model, state.model)
        raise Refused(409, "ModelDiffers", f"{node}: its model has another {field} than the other nodes'")
    known = state.agents.get(node)
    same = (
        known is not None
        and node not in state.lost
        and known.device == message.device
        and known.samples == message.samples
        and known.evaluation_samples == message.evaluation_samples
        and known.notes == message.notes
        and known.shape == shape
    )
    return Verdict.KNOWN if same else Verdict.NEW


def brings_model(state: JobState, node: str, shape: str) -> bool:
    """Return whether the job keeps the shape that the node registers, and not only its digest.

    It keeps `MODELS`. A new shape replaces the least common one if more nodes have the new one: however many
    models hostile nodes make up, that of most nodes is kept.
    """
    if shape in state.models or state.models_of.get(node, 0) >= MODELS_PER_NODE:
        return False
    others = Counter(found for name, found in state.shapes.items() if name != node)
    kept = state.models.keys() - {state.shape}
    return len(state.models) < MODELS or others[shape] + 1 > min(others[model] for model in kept)


def _require_possible(state: JobState, node: str, model: ModelShape) -> None:
    """Refuse a shape that no model of the job's task has, or whose updates no store should take."""
    spec = state.spec
    if model.causal != (spec.model.task is Task.CAUSAL_LM):
        raise Refused(422, "ModelInvalid", f"{node}: causal: not what spec.model.task asks for")
    # A dense layer and the classes' scores, each with its bias, are the largest heads there are.
    wide = model.hidden + 1
    largest = 0 if model.causal else 2 * wide * (wide + len(spec.model.labels))
    if sum(tensor.size for tensor in model.head) > largest:
        raise Refused(422, "ModelInvalid", f"{node}: head: larger than spec.model.labels and hidden allow")
    rank = spec.adapter.ranks.max
    ranks = dict.fromkeys((matrix.name for matrix in model.matrices), rank)
    size = trained_bytes(model.matrices, model.head, ranks)
    if size > UPDATE_LIMIT:
        text = f"{node}: an update at spec.adapter.ranks.max has {size} bytes, more than {UPDATE_LIMIT}; "
        raise Refused(422, "ModelTooLarge", text + "lower it or name fewer spec.adapter.modules")


def profile(state: JobState, node: str, report: ProfileReport) -> Verdict:
    """Accept one profile a node, with a score for exactly the candidate matrices where asked for."""
    if node in state.profiles:
        return Verdict.KNOWN
    if state.plan is None or node not in state.plan.nodes or state.profiling_done:
        raise Refused(409, "NotProfiling", f"{node} was not asked for a profile")
    planned = max(plan.nodes[node].micro_batch for plan in state.plans.values() if node in plan.nodes)
    _at_most(node, "microBatch", report.micro_batch, planned, "planned")
    candidates: set[str] = set()
    if state.spec.adapter.selection.mode == "importance":
        assert state.model is not None
        candidates = {matrix.name for matrix in state.model.matrices}
    if set(report.scores) != candidates:
        odd = min(candidates ^ set(report.scores))
        if odd in candidates:
            text = f"matrix {odd} is missing from the importance report of {node}"
        else:
            text = f"the importance report of {node} has a matrix that was not asked for"
        raise Refused(422, "ImportanceInvalid", text)
    return Verdict.NEW


def evaluation(state: JobState, node: str, message: Evaluation) -> Verdict:
    """Accept one evaluation a node and round: of the latest aggregated round, on what the node holds out."""
    if node in state.evaluations.get(message.round, {}):
        return Verdict.KNOWN
    if message.round != state.done:
        raise Refused(409, "RoundClosed", f"round {message.round} is not the latest; {state.done} is")
    if state.plan is None or node not in state.plan.nodes:
        raise Refused(403, "NotAParticipant", f"{node} takes no part in job {state.name}")
    if message.precision is not state.plan.nodes[node].precision:
        raise Refused(
            409, "PrecisionDiffers", f"{node} evaluated at another precision than it has in the plan"
        )
    _at_most(node, "samples", message.samples, _agent(state, node).evaluation_samples, "registered")
    if state.spec.model.task is Task.SEQUENCE_CLASSIFICATION:
        if message.tokens != message.samples:
            raise Refused(422, "ClaimInvalid", f"{node}: tokens: not samples, though each has one class")
        if message.correct is None:
            raise Refused(422, "ClaimInvalid", f"{node}: correct: missing, though samples have classes")
        _at_most(node, "correct", message.correct, message.samples, "evaluated")
        if message.confusion:
            _confusion(state, node, message)
    else:
        _at_most(node, "tokens", message.tokens, message.samples * state.spec.data.max_length, "possible")
        if message.correct is not None or message.confusion:
            field = "confusion" if message.correct is None else "correct"
            raise Refused(422, "ClaimInvalid", f"{node}: {field}: given, though samples have no classes")
    _at_most(node, "lossSum", message.loss_sum, LOSS_LIMIT * message.tokens, "possible")
    return Verdict.NEW


def _confusion(state: JobState, node: str, message: Evaluation) -> None:
    """Raise Refused for a confusion matrix that the counts beside it contradict."""
    classes, cells = len(state.spec.model.labels), message.confusion
    right = sum(cells[:: classes + 1])
    if (len(cells), sum(cells), right) != (classes**2, message.samples, message.correct):
        text = f"{node}: confusion: not of {classes} classes, or another sum than samples and correct have"
        raise Refused(422, "ClaimInvalid", text)


def update(state: JobState, node: str, round_number: int, manifest: UpdateManifest) -> Verdict:
    """Accept the first update of a participant while the round is open, made of what it was given.

    The rule for latecomers: a round that closed stays closed. An update for it is answered with 409 and
    dropped; only the very bytes that were accepted before are answered with success again.
    """
    known = state.rounds.get(round_number)
    if known is None:
        raise Refused(409, "RoundUnknown", f"round {round_number} has not begun")
    if node not in known.opened.participants:
        text = f"{node} takes no part in round {round_number}"
        raise misfit(known.opened, Refused(403, "NotAParticipant", text))
    accepted = known.updates.get(node)
    if accepted is not None and accepted.digest == manifest.digest:
        return Verdict.KNOWN
    if known.closed is not None:
        raise Refused(409, "RoundClosed", f"round {round_number} is closed; the update of {node} is dropped")
    if accepted is not None:
        raise Refused(409, "AlreadyAccepted", f"round {round_number} has another update of {node}")
    if state.finished or state.spec.suspend:
        raise Refused(409, "RoundClosed", f"job {state.name} takes no updates now")
    _require_bound(state, node, round_number, manifest)
    try:
        _require_done(state, node, state.plans[known.opened.plan].nodes[node], manifest)
    except Refused as refusal:
        raise misfit(known.opened, refusal) from None
    return Verdict.NEW


def misfit(opened: RoundOpened, refusal: Refused) -> Refused:
    """Return how an update is refused that is not what the plan asks for: it may be of the plan before."""
    if opened.again is None:
        return refusal
    text = f"round {opened.round} was opened again by another plan ({refusal.message}); the update is dropped"
    return Refused(409, "PlanChanged", text)


def _require_bound(state: JobState, node: str, round_number: int, manifest: UpdateManifest) -> None:
    """Refuse what was made for another round, or from another global adapter."""
    if manifest.round != round_number:
        raise Refused(
            409, "RoundDiffers", f"the update of {node} is of round {manifest.round}, not of {round_number}"
        )
    sent = state.sent_after(round_number - 1)
    if manifest.adapter != (sent.digest if sent else None):
        text = f"the update of {node} started from another global adapter than round {round_number}"
        raise Refused(409, "StartDiffers", text)
    before = state.accepted.get(manifest.digest, round_number)
    if before != round_number:
        text = f"the update of {node} has the very bytes of one of round {before}; train and send another"
        raise Refused(422, "UpdateReplayed", text)


def _require_done(state: JobState, node: str, plan: NodePlan, manifest: UpdateManifest) -> None:
    """Refuse more than the node registered and was asked to do."""
    _at_most(node, "samples", manifest.samples, _agent(state, node).samples, "registered")
    if manifest.planned_steps != plan.local_steps:
        text = f"{node}: plannedSteps: {manifest.planned_steps}, but {plan.local_steps} are planned"
        raise Refused(422, "ClaimInvalid", text)
    _at_most(node, "steps", manifest.steps, plan.local_steps, "planned")
    _at_most(node, "microBatch", manifest.micro_batch, plan.micro_batch, "planned")
    batch = plan.micro_batch * plan.accumulation
    most = manifest.steps * batch * state.spec.data.max_length
    _at_most(node, "tokens", manifest.tokens, most, "possible in its steps")


def _agent(state: JobState, node: str) -> AgentRegistered:
    known = state.agents.get(node)
    if known is None:
        raise Refused(409, "NotRegistered", f"{node} has not registered since the job was resumed")
    return known


def _at_most(node: str, field: str, claimed: float, limit: float, what: str) -> None:
    if claimed > limit:
        raise Refused(422, "ClaimInvalid", f"{node}: {field}: {claimed:g}, but {limit:g} are {what}")
