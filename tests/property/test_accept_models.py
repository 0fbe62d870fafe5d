# SPDX-License-Identifier: Apache-2.0
"""Whose model counts: of what nodes register, the shape that most have is the job's, whatever the others say."""

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpipe_api.wire import ModelShape
from fedpipe_operator.engine import accept
from fedpipe_operator.engine.accept import Refused, Verdict
from fedpipe_operator.engine.decide import MakePlan, Wait, decide
from fedpipe_operator.engine.order import check
from fedpipe_operator.engine.records import AgentRegistered, Offered, Submitted, UpdateAccepted
from fedpipe_operator.engine.shapes import MODELS, MODELS_PER_NODE, digest_of
from fedpipe_operator.engine.state import apply, submitted
from standins.agents import manifest_of, registration
from standins.server import job
from standins.world import PLAN, SHAPE, World

BOGUS = SHAPE.model_copy(update={"architecture": "bogus"})


def taken_in(world: World, node: str, shape: ModelShape) -> None:
    """Register a node as the engine does."""
    message, digest = registration(shape), digest_of(shape)
    assert accept.registration(world.state, node, message) is Verdict.NEW
    world.record(
        AgentRegistered(
            sequence=world.state.sequence + 1,
            node=node,
            device=message.device,
            samples=100,
            evaluation_samples=10,
            shape=digest,
            model=shape if accept.brings_model(world.state, node, digest) else None,
        )
    )


def gathered(nodes: int, shapes: Mapping[str, ModelShape], minimum: int = 1) -> World:
    """A world in which the nodes have registered the given shapes, in that order."""
    world = World(nodes, minimum)
    for node, shape in shapes.items():
        taken_in(world, node, shape)
    return world


def test_a_bogus_first_registrant_does_not_fix_the_model() -> None:
    world = gathered(3, {"node-2": BOGUS, "node-0": SHAPE, "node-1": SHAPE})
    assert world.state.model == SHAPE
    assert decide(world.state, world.now) == MakePlan("all agents registered")
    assert len([record for _, record in world.ledger if getattr(record, "model", None)]) == 2, "each once"


def test_without_a_majority_the_job_says_what_to_do() -> None:
    world = gathered(4, {"node-0": BOGUS, "node-1": SHAPE, "node-2": BOGUS, "node-3": SHAPE})
    waiting = decide(world.state, world.now)
    assert isinstance(waiting, Wait)
    assert waiting.reason == "ModelDiffers"
    assert waiting.message == (
        "no model is that of more than half of the 4 nodes: node-0, node-2 and node-1, node-3 differ in "
        "architecture; correct spec.model on the wrong ones, or exclude them by spec.nodes.selector"
    )
    other = gathered(4, {"node-0": BOGUS, "node-1": SHAPE, "node-2": SHAPE, "node-3": SHAPE})
    assert isinstance(decide(other.state, other.now), MakePlan)


def bogus(number: int) -> ModelShape:
    """One of as many made-up models as a test needs."""
    return SHAPE.model_copy(update={"layers": 10 + number})


def test_a_node_brings_only_so_many_models() -> None:
    world = gathered(2, {"node-1": SHAPE})
    for number in range(2 * MODELS):
        taken_in(world, "node-0", bogus(number))
    assert world.state.models_of["node-0"] == MODELS_PER_NODE
    kept = {digest_of(shape) for shape in (SHAPE, *map(bogus, range(MODELS_PER_NODE)))}
    assert set(world.state.models) == kept, "of the others the ledger has digests"
    taken_in(world, "node-0", SHAPE)
    assert isinstance(decide(world.state, world.now), MakePlan), "it may come to reason"


@pytest.mark.parametrize("honest", [MODELS, 40])
def test_made_up_models_do_not_keep_the_right_one_out(honest: int) -> None:
    """Hostile nodes register before all others, as many models as they may, and again in between."""
    world = World(2 * honest - 1, honest)
    hostile = world.nodes[honest:]
    made_up = itertools.count()
    for _ in range(MODELS_PER_NODE):
        for node in hostile:
            taken_in(world, node, bogus(next(made_up)))
    for node, enemy in itertools.zip_longest(world.nodes[:honest], hostile):
        taken_in(world, node, SHAPE)
        if enemy:
            taken_in(world, enemy, bogus(next(made_up)))
    assert len(world.state.models) == MODELS, "the largest shapes take 6 MiB each"
    assert world.state.model == SHAPE
    assert isinstance(decide(world.state, world.now), MakePlan)


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 20)), max_size=60), st.integers(5, 9))
@settings(deadline=None)
def test_the_model_that_most_nodes_have_is_kept(others: list[tuple[int, int]], honest: int) -> None:
    """In whatever order nodes come, return, and change their minds."""
    world = World(9, 1)
    for node, number in others:
        if world.state.shapes.get(f"node-{node}") != digest_of(bogus(number)):
            taken_in(world, f"node-{node}", bogus(number))
    for node in world.nodes[:honest]:
        taken_in(world, node, SHAPE)
    assert world.state.model == SHAPE
    assert len(world.state.models) <= MODELS
    again = submitted("uid", world.first, 1000.0)
    for at, record in world.ledger:
        check(again, record)
        apply(again, record, at)
    assert again == world.state


def test_a_ledger_without_digests_is_read_as_before() -> None:
    state = submitted("uid", Submitted(namespace="n", name="j", generation=1, spec=job(2, 5).spec), 0.0)
    apply(state, Offered(sequence=1, nodes=("a", "b")), 0.0)
    for sequence, node in enumerate(("a", "b"), 2):
        record = {
            "kind": "registered", "sequence": sequence, "node": node, "samples": 5, "evaluationSamples": 1,
            "device": registration(SHAPE).device.to_dict(),
        } | ({"model": SHAPE.to_dict()} if node == "a" else {})  # fmt: skip
        apply(state, AgentRegistered.model_validate(record), 1.0)
    assert state.model == SHAPE
    assert accept.registration(state, "b", registration(SHAPE, samples=5)) is Verdict.NEW
    manifest = manifest_of(b"-", PLAN).to_dict()
    del manifest["round"]
    assert UpdateAccepted.model_validate({"round": 1, "node": "a", "manifest": manifest}).manifest.round == 0


POSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "a causal model for a classification": ({"causal": True, "head": ()}, "causal"),
    "a head larger than the classes": (
        {"head": tuple(t.model_copy(update={"shape": (10**4, 10**4)}) for t in SHAPE.head)},
        "head: larger",
    ),
    "updates that no store should take": (
        {
            "parameters": 2**42,
            "matrices": tuple(
                m.model_copy(update={"name": f"m{i}", "rows": 2**20, "columns": 2**10})
                for i, m in enumerate(SHAPE.matrices * 200)
            ),
        },
        "ranks.max has",
    ),
}


@pytest.mark.parametrize("case", POSSIBLE)
def test_a_shape_that_no_model_of_the_job_has_is_refused(case: str) -> None:
    change, text = POSSIBLE[case]
    world = World(2, 1)
    message = registration(SHAPE)
    message = message.model_copy(update={"model": SHAPE.model_copy(update=change)})
    with pytest.raises(Refused, match=text) as caught:
        accept.registration(world.state, "node-0", message)
    assert caught.value.status == 422
