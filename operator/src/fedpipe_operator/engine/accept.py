"""Whether a message from an agent is accepted: pure checks against the state."""

from enum import Enum

from fedpipe_api.wire import HEAD, LORA_A, LORA_B, Evaluation, ProfileReport, Registration, UpdateManifest

from .state import JobState


class Refused(Exception):
    """A message is not accepted: an HTTP status, a CamelCase reason and one line for people."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.message = message


class Verdict(Enum):
    """What to do with an acceptable message."""

    NEW = "new"
    KNOWN = "known"  # recorded before: answer as then, change nothing


def registration(state: JobState, node: str, message: Registration) -> Verdict:
    """Accept an agent of an offered node whose model is the model that the others have."""
    if node not in state.offered:
        raise Refused(403, "NotOffered", f"{node} is not a node of job {state.name}")
    if state.model is not None and message.model != state.model:
        field = next(
            name
            for name in type(message.model).model_fields
            if getattr(message.model, name) != getattr(state.model, name)
        )
        raise Refused(
            409,
            "ModelDiffers",
            f"{node}: its model has another {field} than the other nodes'",
        )
    known = state.agents.get(node)
    same = (
        known is not None
        and node not in state.lost
        and known.device == message.device
        and known.samples == message.samples
        and known.evaluation_samples == message.evaluation_samples
    )
    return Verdict.KNOWN if same else Verdict.NEW


def profile(state: JobState, node: str, report: ProfileReport) -> Verdict:
    """Accept one profile a node, with a finite score for exactly the candidate matrices where asked for."""
    if node in state.profiles:
        return Verdict.KNOWN
    if state.plan is None or node not in state.plan.nodes or state.profiling_done:
        raise Refused(409, "NotProfiling", f"{node} was not asked for a profile")
    if state.spec.adapter.selection.mode == "importance":
        assert state.model is not None
        candidates = {matrix.name for matrix in state.model.matrices}
        if set(report.scores) != candidates:
            odd = min(candidates ^ set(report.scores))
            what = "missing from" if odd in candidates else "unknown in"
            raise Refused(422, "ImportanceInvalid", f"matrix {odd} is {what} the importance report of {node}")
        negative = next((name for name, score in report.scores.items() if score < 0), None)
        if negative is not None:
            raise Refused(422, "ImportanceInvalid", f"the score of {negative} from {node} is negative")
    return Verdict.NEW


def evaluation(state: JobState, node: str, message: Evaluation) -> Verdict:
    """Accept one evaluation a node and round, of the latest aggregated round."""
    if node in state.evaluations.get(message.round, {}):
        return Verdict.KNOWN
    if message.round != state.done:
        raise Refused(409, "RoundClosed", f"round {message.round} is not the latest; {state.done} is")
    if state.plan is None or node not in state.plan.nodes:
        raise Refused(403, "NotAParticipant", f"{node} takes no part in job {state.name}")
    return Verdict.NEW


def update(state: JobState, node: str, round_number: int, manifest: UpdateManifest) -> Verdict:
    """Accept the first update of a participant while the round is open.

    The rule for latecomers: a round that closed stays closed. An update for it is answered with 409 and
    dropped; only the very bytes that were accepted before are answered with success again.
    """
    known = state.rounds.get(round_number)
    if known is None:
        raise Refused(409, "RoundUnknown", f"round {round_number} has not begun")
    if node not in known.opened.participants:
        raise Refused(403, "NotAParticipant", f"{node} takes no part in round {round_number}")
    accepted = known.updates.get(node)
    if accepted is not None and accepted.digest == manifest.digest:
        return Verdict.KNOWN
    if known.closed is not None:
        raise Refused(409, "RoundClosed", f"round {round_number} is closed; the update of {node} is dropped")
    if accepted is not None:
        raise Refused(409, "AlreadyAccepted", f"round {round_number} has another update of {node}")
    if state.finished or state.spec.suspend:
        raise Refused(409, "RoundClosed", f"job {state.name} takes no updates now")
    return Verdict.NEW


def update_shapes(state: JobState, node: str) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor that the node's update must hold."""
    assert state.model is not None
    assert state.plan is not None
    shapes: dict[str, tuple[int, ...]] = {}
    ranks = state.plan.nodes[node].ranks
    for matrix in state.model.matrices:
        rank = ranks.get(matrix.name, 0)
        if rank:
            shapes[matrix.name + LORA_B] = (matrix.rows, rank)
            shapes[matrix.name + LORA_A] = (rank, matrix.columns)
    for tensor in state.model.head:
        shapes[HEAD + tensor.name] = tensor.shape
    return shapes
