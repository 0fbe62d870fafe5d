# SPDX-License-Identifier: Apache-2.0
"""Whose kernel check a FedPipeNode shows, when several jobs' agents ran one."""

from fedpipe_api.job import Precision
from fedpipe_api.wire import KernelResult
from fedpipe_operator.engine.records import AgentRegistered
from fedpipe_operator.engine.state import JobState, apply
from fedpipe_operator.kube.verified_precisions import VerifiedPrecisions
from kube.looks import SHAPE, state_of
from kube.objects import job
from standins.agents import registration

NODES = {"edge-1", "edge-2"}


def registered(at: float, *, usable: bool, node: str = "edge-1") -> JobState:
    """A job whose agent registered on the node at `at`, nf4 usable or not."""
    state = state_of(job())
    kernels = (KernelResult(precision=Precision.NF4, usable=usable),)
    device = registration(SHAPE).device.model_copy(update={"kernels": kernels})
    record = AgentRegistered(sequence=1, node=node, device=device, samples=10, evaluation_samples=1)
    apply(state, record, at)
    return state


def due(proofs: VerifiedPrecisions, *states: JobState) -> list[tuple[float, bool]]:
    """Look at every job once and record what is due: its time, and what it says of nf4."""
    found = []
    for state in states:
        for proof in proofs.due(state, lambda: states, NODES):
            proofs.recorded(proof)
            found.append((proof.at, proof.kernels[0].usable))
    return found


def test_the_newest_registration_on_a_node_is_recorded_once() -> None:
    older, newer = registered(100, usable=True), registered(200, usable=False)
    for states in ((older, newer), (newer, older)):
        proofs = VerifiedPrecisions()  # as after a restart: all jobs are looked at, in any order
        assert due(proofs, *states) == [(200, False)]
        assert due(proofs, *states) == []


def test_a_later_registration_of_any_job_is_recorded_again() -> None:
    proofs, first = VerifiedPrecisions(), registered(100, usable=True)
    assert due(proofs, first) == [(100, True)]
    second = registered(200, usable=False)
    assert due(proofs, first, second) == [(200, False)]
    again = registered(300, usable=True)
    assert due(proofs, again, second) == [(300, True)]
    assert due(proofs, first) == []  # the others are deleted: theirs stays


def test_nodes_are_apart_and_an_agent_without_a_check_proves_nothing() -> None:
    one, two = registered(100, usable=True), registered(50, usable=False, node="edge-2")
    none = registered(300, usable=True)
    device = none.agents["edge-1"].device.model_copy(update={"kernels": ()})
    none.agents["edge-1"] = none.agents["edge-1"].model_copy(update={"device": device})
    proofs = VerifiedPrecisions()
    assert due(proofs, one, two) == [(100, True), (50, False)]
    assert due(proofs, none) == []


def test_a_failure_without_words_gets_some() -> None:
    state = registered(100, usable=False)
    (proof,) = VerifiedPrecisions().due(state, lambda: [state], NODES)
    assert proof.precisions() == [
        {"precision": "nf4", "usable": False, "verified": True, "message": "its kernel failed"}
    ]
