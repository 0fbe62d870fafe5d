# SPDX-License-Identifier: Apache-2.0
"""What a node may say: claims beyond what it registered and was asked for are refused, and nothing else raised."""

import json
import math
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpipe_api.base import Model
from fedpipe_api.wire import (
    BadMessage,
    Blob,
    Evaluation,
    Precision,
    ProfileReport,
    Progress,
    Registration,
    UpdateManifest,
    read_message,
)
from fedpipe_operator.engine import accept
from fedpipe_operator.engine.accept import Refused, Verdict
from fedpipe_operator.engine.evaluations import evaluation_of
from fedpipe_operator.engine.quota import held, quota
from fedpipe_operator.engine.state import JobState
from fedpipe_operator.engine.weights import CAP, capped
from property.test_accept_models import BOGUS, gathered
from standins.agents import make_update, manifest_of, registration
from standins.server import job
from standins.world import PLAN, SHAPE, World, deliver, ready


def trained_round(world: World) -> None:
    """Let every node deliver, and the round be aggregated."""
    for node in world.nodes:
        deliver(world, node)
    world.settle()


def second_round() -> World:
    """A world of three nodes whose second round is open."""
    world = ready(minimum=3)
    trained_round(world)
    assert world.state.current
    assert world.state.current.opened.round == 2
    return world


def true_manifest(world: World, node: str = "node-0") -> UpdateManifest:
    """The manifest that an honest node sends in the open round."""
    assert world.state.current
    number = world.state.current.opened.round
    body = make_update(SHAPE, PLAN, node, number)
    return manifest_of(body, PLAN, number, world.state.sent_after(number - 1))


WORLD = second_round()
"""Only read."""

CLAIMS: dict[str, tuple[dict[str, Any], int, str]] = {
    "samples 10^12": ({"samples": 10**12}, 422, "ClaimInvalid"),
    "one sample more than registered": ({"samples": 101}, 422, "ClaimInvalid"),
    "more steps than planned": ({"steps": 3}, 422, "ClaimInvalid"),
    "other steps planned": ({"planned_steps": 1}, 422, "ClaimInvalid"),
    "a larger micro-batch": ({"micro_batch": 5}, 422, "ClaimInvalid"),
    "more tokens than its steps hold": ({"tokens": 2 * 4 * 256 + 1}, 422, "ClaimInvalid"),
    "of another round": ({"round": 1}, 409, "RoundDiffers"),
    "without its round": ({"round": 0}, 409, "RoundDiffers"),
    "from no adapter": ({"adapter": None}, 409, "StartDiffers"),
    "from another adapter": ({"adapter": "0" * 64}, 409, "StartDiffers"),
}


@pytest.mark.parametrize("case", CLAIMS)
def test_an_update_claims_no_more_than_it_may(case: str) -> None:
    change, status, reason = CLAIMS[case]
    manifest = true_manifest(WORLD)
    assert accept.update(WORLD.state, "node-0", 2, manifest) is Verdict.NEW
    with pytest.raises(Refused) as caught:
        accept.update(WORLD.state, "node-0", 2, manifest.model_copy(update=change))
    assert (caught.value.status, caught.value.reason) == (status, reason)


def test_old_bytes_do_not_pass_in_a_later_round() -> None:
    old = WORLD.state.rounds[1].updates["node-0"]
    with pytest.raises(Refused, match="is of round 1, not of 2"):
        accept.update(WORLD.state, "node-0", 2, old)
    for node in WORLD.nodes:
        renamed = true_manifest(WORLD, node).model_copy(update={"digest": old.digest})
        with pytest.raises(Refused, match="the very bytes of one of round 1") as caught:
            accept.update(WORLD.state, node, 2, renamed)
        assert caught.value.reason == "UpdateReplayed"
    # An agent that missed the answer sends the same update of the same round again.
    assert accept.update(WORLD.state, "node-0", 1, old) is Verdict.KNOWN


EVALUATIONS: dict[str, tuple[dict[str, Any], int, str]] = {
    "more samples than held out": ({"samples": 11, "tokens": 11}, 422, "ClaimInvalid"),
    "samples 10^12": ({"samples": 10**12, "tokens": 10**12}, 422, "ClaimInvalid"),
    "correct 10^9": ({"correct": 10**9}, 422, "ClaimInvalid"),
    "one more right than samples": ({"correct": 11}, 422, "ClaimInvalid"),
    "nothing counted": ({"correct": None}, 422, "ClaimInvalid"),
    "more classes than samples": ({"tokens": 100}, 422, "ClaimInvalid"),
    "a loss beyond all models": ({"loss_sum": 1e18}, 422, "ClaimInvalid"),
    "a confusion matrix of another size": ({"confusion": (5, 5)}, 422, "ClaimInvalid"),
    "one of more samples": ({"confusion": (5, 6, *(0,) * 7)}, 422, "ClaimInvalid"),
    "one of other right answers": ({"confusion": (3, 5, 0, 2, *(0,) * 5)}, 422, "ClaimInvalid"),
    "another precision": ({"precision": Precision.NF4}, 409, "PrecisionDiffers"),
    "another round": ({"round": 2}, 409, "RoundClosed"),
}


@pytest.mark.parametrize("case", EVALUATIONS)
def test_an_evaluation_claims_no_more_than_it_may(case: str) -> None:
    change, status, reason = EVALUATIONS[case]
    good = Evaluation(round=1, samples=10, tokens=10, loss_sum=20, correct=5, precision=Precision.FP32)
    assert accept.evaluation(WORLD.state, "node-0", good) is Verdict.NEW
    counted = good.model_copy(update={"confusion": (5, 5, *(0,) * 7)})
    assert accept.evaluation(WORLD.state, "node-0", counted) is Verdict.NEW
    with pytest.raises(Refused) as caught:
        accept.evaluation(WORLD.state, "node-0", good.model_copy(update=change))
    assert (caught.value.status, caught.value.reason) == (status, reason)


def test_a_language_model_evaluates_tokens_and_counts_no_classes() -> None:
    state = second_round().state
    model = {"hostPath": {"path": "/model"}, "task": "causal-lm"}
    state.spec = job(3, 3, model=model).spec
    good = Evaluation(round=1, samples=10, tokens=2560, loss_sum=20, precision=Precision.FP32)
    assert accept.evaluation(state, "node-0", good) is Verdict.NEW
    for change in ({"tokens": 2561}, {"correct": 1}, {"confusion": (10,)}):
        with pytest.raises(Refused, match=next(iter(change))):
            accept.evaluation(state, "node-0", good.model_copy(update=change))


def test_a_profile_claims_no_more_than_it_may() -> None:
    world = World(3, 3)
    for node in world.nodes:
        world.register(node)
    world.settle()
    scores = {matrix.name: 1.0 for matrix in SHAPE.matrices}
    good = ProfileReport(step_seconds=1, peak_bytes=1, micro_batch=4, scores=scores)
    assert accept.profile(world.state, "node-0", good) is Verdict.NEW
    for change in ({"micro_batch": 5}, {"scores": {}}, {"scores": scores | {"x\nADMIN": 1.0}}):
        with pytest.raises(Refused) as caught:
            accept.profile(world.state, "node-0", good.model_copy(update=change))
        assert caught.value.message.isprintable()


# Weights

CLAIMED = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 10**12), min_size=1)


@given(CLAIMED)
def test_no_claim_counts_for_more_than_its_multiple(claims: dict[str, int]) -> None:
    found = capped(claims)
    assert found.keys() == claims.keys()
    for node, claim in claims.items():
        others = [other for name, other in claims.items() if name != node and other]
        limit = CAP * median(others) if others else math.inf
        assert found[node] == pytest.approx(min(claim, limit), rel=1e-12)
        assert min(1, claim) <= found[node] <= claim


@given(st.integers(5, 50), st.integers(100, 200), st.integers(1, 10**12))
def test_one_liar_among_equals_never_has_half_of_the_weight(nodes: int, samples: int, lie: int) -> None:
    claims = {f"node-{i}": samples for i in range(nodes - 1)} | {"liar": lie}
    found = capped(claims)
    assert found["liar"] < sum(found.values()) / 2
    assert all(found[node] == samples for node in claims if node != "liar" and lie >= samples)


def test_two_liars_of_five_do_not_raise_each_other() -> None:
    assert capped({"a": 100, "b": 100, "c": 100, "x": 10**12, "y": 10**12})["x"] == 300


def test_honest_but_uneven_nodes_count_as_they_are() -> None:
    claims = {"a": 100, "b": 250, "c": 40, "d": 180}
    assert capped(claims) == claims
    assert capped({"only": 10**12}) == {"only": 10**12}
    assert capped({"a": 0.0, "b": 5.0}) == {"a": 0.0, "b": 5.0}


def test_those_who_claim_nothing_do_not_lift_the_limit() -> None:
    assert capped({"a": 0, "b": 0, "c": 0, "d": 100, "liar": 10**12})["liar"] == 300


def test_one_evaluation_of_10_12_samples_does_not_take_the_metric() -> None:
    world = second_round()
    state = world.state
    lie = {"samples": 10**12, "evaluation_samples": 10**12}
    state.agents["node-0"] = state.agents["node-0"].model_copy(update=lie)
    for node in world.nodes:
        size = 10**12 if node == "node-0" else 10
        message = Evaluation(
            round=1, samples=size, tokens=size, loss_sum=10 if size == 10 else 0, correct=size // 10**12 * size,
            precision=Precision.FP32,
        )  # fmt: skip
        assert accept.evaluation(state, node, message) is Verdict.NEW
        state.evaluations.setdefault(1, {})[node] = message
    found = evaluation_of(state, 1)
    assert found
    assert found.accuracy == pytest.approx(30 / 50), "10^12 right of 10^12 count as 30 of 30"
    assert found.loss == pytest.approx(20 / 50)


# What a job may hold


def test_the_quota_covers_a_job_and_never_half_of_the_volume() -> None:
    state = WORLD.state
    limit = quota(state, 1 << 50)
    update = 4 * sum(4 * (m.rows + m.columns) for m in SHAPE.matrices)
    assert limit > 3 * update
    assert held(state) < limit
    assert quota(state, 1000) == 500
    assert quota(World(2, 1).state, 1 << 50) == 0, "no plan, no uploads"


# Nothing but Refused

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(10**400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def mutated(good: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Documents that differ from a good one in some fields, at any depth."""
    fields = {
        name: st.just(value)
        | (mutated(value) if isinstance(value, dict) and value else st.just(value))
        | JSON
        for name, value in good.items()
    }
    return st.fixed_dictionaries(fields)


def require_line(text: str) -> None:
    assert text
    assert text.isprintable()
    assert len(text) < 1024


MESSAGES: dict[type[Model], tuple[Model, Callable[[JobState, Any], object]]] = {
    Registration: (
        registration(SHAPE),
        lambda state, message: accept.registration(state, "node-0", message),
    ),
    ProfileReport: (
        ProfileReport(step_seconds=1, peak_bytes=1, micro_batch=4),
        lambda state, message: accept.profile(state, "node-0", message),
    ),
    Evaluation: (
        Evaluation(round=1, samples=10, tokens=10, loss_sum=1, correct=1, precision=Precision.FP32),
        lambda state, message: accept.evaluation(state, "node-0", message),
    ),
    UpdateManifest: (
        true_manifest(WORLD),
        lambda state, message: accept.update(state, "node-0", 2, message),
    ),
    Progress: (
        Progress.model_validate({"kind": "train", "round": 1, "state": "training"}),
        lambda state, message: None,
    ),
}
STATES = (WORLD.state, ready().state, World(2, 1).state, gathered(2, {"node-0": BOGUS}).state)


@settings(max_examples=400, deadline=None)
@given(st.data(), st.sampled_from(sorted(MESSAGES, key=lambda kind: kind.__name__)))
def test_any_document_is_accepted_or_refused(data: st.DataObject, kind: type[Model]) -> None:
    good, check = MESSAGES[kind]
    document = data.draw(JSON | mutated(good.to_dict()))
    state = data.draw(st.sampled_from(STATES))
    try:
        message = read_message(kind, json.dumps(document))
        assert kind.model_validate_json(message.to_json()) == message, "the ledger can be read again"
        check(state, message)
    except BadMessage as error:
        require_line(str(error))
    except Refused as refused:
        require_line(refused.message)
        require_line(refused.reason)


@settings(max_examples=200, deadline=None)
@given(st.text() | st.binary(), st.sampled_from(sorted(MESSAGES, key=lambda kind: kind.__name__)))
def test_any_bytes_are_refused(body: str | bytes, kind: type[Model]) -> None:
    with pytest.raises(BadMessage):
        read_message(kind, body)


def test_an_adapter_that_nodes_download_is_what_an_update_starts_from() -> None:
    world = second_round()
    known = world.state.rounds[1].result
    assert known
    sent = Blob(digest="f" * 64, size=1)
    world.state.rounds[1].result = known.model_copy(update={"sent": sent})
    with pytest.raises(Refused, match="started from another global adapter"):
        accept.update(
            world.state,
            "node-0",
            2,
            true_manifest(world).model_copy(update={"adapter": known.adapter.digest}),
        )
    assert accept.update(world.state, "node-0", 2, true_manifest(world)) is Verdict.NEW
