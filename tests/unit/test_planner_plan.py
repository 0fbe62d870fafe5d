# SPDX-License-Identifier: Apache-2.0
"""What a plan says to people, and what a wrong request is answered."""

import math
import random
import time

import pytest

from fedpipe_api import wire
from fedpipe_api.base import UserError
from fedpipe_api.job import FedPipeJobSpec, Precision, Ranks
from fedpipe_operator.planner import (
    Calibration,
    NodeFacts,
    PlanRequest,
    asked_steps,
    calibrate,
    needs_replan,
    plan,
    rows,
    select_matrices,
    slow_line,
    summary_line,
)
from fedpipe_operator.planner.fleet_plan import rank_choices, under_training

GIB = 2**30
NAMES = tuple(
    f"bert.encoder.layer.{layer}.attention.{part}"
    for layer in range(12)
    for part in ("self.query", "self.key", "self.value", "output.dense")
)
BERT = wire.ModelShape(
    architecture="bert",
    layers=12,
    hidden=768,
    heads=12,
    key_value_heads=12,
    intermediate=3072,
    vocabulary=30522,
    causal=False,
    parameters=109_482_240,
    linear_parameters=85_524_480,
    matrices=tuple(wire.MatrixShape(name=name, rows=768, columns=768) for name in NAMES),
    head=(wire.TensorShape(name="classifier.weight", shape=(4, 768)),),
)
WIDE = {"ranks": {"min": 2, "max": 256}}
SCORES = {name: 1.0 + index for index, name in enumerate(NAMES)}


def job(**changes):
    document = {
        "model": {"hostPath": {"path": "/m"}, "task": "sequence-classification", "labels": ["a", "b"]},
        "data": {"volume": {"hostPath": {"path": "/d"}}, "train": "t.jsonl", "maxLength": 128},
        "rounds": {"count": 1, "localSteps": 50, "batchSize": 16, "deadline": "20m"},
        "adapter": {"ranks": {"min": 2, "max": 16}},
    }
    return FedPipeJobSpec.model_validate({**document, **changes})


def facts(name, gib, *, precisions=tuple(Precision), **changes):
    device = {
        "kind": "cpu",
        "name": "cpu",
        "free_memory": round(gib * GIB),
        "overhead": 400 * 2**20,
        "threads": 4,
        "speed": 1.0,
        "kernels": tuple(
            wire.KernelResult(precision=precision, usable=precision in precisions, seconds=0.004)
            for precision in Precision
        ),
    }
    samples = changes.pop("samples", 1000)
    calibration = changes.pop("calibration", None)
    previous = changes.pop("previous", None)
    return NodeFacts(
        name, wire.DeviceFacts(**(device | changes)), samples, calibration=calibration, previous=previous
    )


def planned(*nodes, importance=SCORES, spec=None, **changes):
    return plan(PlanRequest(BERT, spec or job(), nodes, importance, **changes))


def test_unequal_nodes_get_unequal_plans_and_each_says_why():
    found = planned(
        facts("large", 8),
        facts("small", 1.0),
        facts("tiny", 0.55),
        facts("slow", 8, speed=0.004),
        facts("none", 0),
        facts("late", 8, speed=1e-6),
    )
    large, small, slow = (found.nodes[name] for name in ("large", "small", "slow"))
    assert (large.precision, large.micro_batch, large.limited_by) == (Precision.FP32, 16, "ranks")
    assert set(large.ranks.values()) == {16}
    assert small.limited_by == "memory"
    assert "would take" in small.reason
    assert small.predicted_bytes <= 0.9 * GIB
    assert slow.limited_by == "time"
    assert slow.local_steps < 50
    assert slow.reason.startswith("50 local steps do not fit the deadline of 20m; it does ")
    assert (
        found.left_out["none"] == f"needs {found.left_out['none'].split()[1]} MiB at bf16 ×1, r 2; has 0 MiB"
    )
    assert found.left_out["tiny"].endswith("at bf16 ×1, r 2; has 506 MiB")
    assert "for one step at" in found.left_out["late"]
    assert "it may take 18m of the round's 20m" in found.left_out["late"]
    assert len(found.selected) == 24
    assert set(found.selected) == set(NAMES[24:])


def test_the_more_important_matrix_never_has_the_lower_rank():
    found = planned(facts("n", 0.85), spec=job(adapter=WIDE, quantization="nf4"))
    ranks = [found.nodes["n"].ranks.get(name, 0) for name in found.selected]
    assert ranks == sorted(ranks)
    assert len(set(ranks)) > 1


def test_rank_zero_only_where_the_lowest_ranks_do_not_fit():
    spec = job(adapter={"ranks": {"min": 512, "max": 512}, "selection": {"mode": "all"}}, quantization="nf4")
    for gib in (1.0, 1.4, 1.8, 3):
        found = planned(facts("n", gib), spec=spec)
        if "n" in found.left_out:
            continue
        node = found.nodes["n"]
        if len(node.ranks) < len(NAMES):
            assert node.limited_by == "memory"
            assert f"{len(NAMES) - len(node.ranks)} selected matrices are not trained here" in node.reason
            # What is trained is what matters most.
            assert sorted(node.ranks) == sorted(NAMES[-len(node.ranks) :])
            break
    else:
        pytest.fail("no budget left a part untrained")
    assert len(planned(facts("n", 3), spec=spec).nodes["n"].ranks) == len(NAMES)


def test_average_gives_every_node_the_rank_that_the_weakest_carries():
    nodes = (facts("large", 8), facts("small", 0.85, precisions=(Precision.NF4,)), facts("none", 0.1))
    spec = job(adapter=WIDE, aggregation={"method": "average"})
    found = planned(*nodes, spec=spec)
    assert set(found.left_out) == {"none"}
    common = {rank for node in found.nodes.values() for rank in node.ranks.values()}
    assert len(common) == 1
    assert common < {2, 4, 8, 16, 32, 64, 128}
    assert set(planned(nodes[0], spec=spec).nodes["large"].ranks.values()) == {256}


@pytest.mark.parametrize(
    ("quantization", "precision"),
    [("none", "fp32"), ("bf16", "bf16"), ("int8", "int8"), ("nf4", "nf4")],
)
def test_a_precision_asked_for_is_kept(quantization, precision):
    found = planned(facts("n", 8), facts("m", 8, precisions=()), spec=job(quantization=quantization))
    assert found.nodes["n"].precision == precision
    assert found.left_out["m"] == (
        f"no precision allowed by spec.quantization works there ({precision}: does not work)"
    )


def test_fewer_samples_ask_fewer_steps():
    rounds = job(rounds={"count": 1, "batchSize": 16, "localEpochs": 0.5}).rounds
    assert asked_steps(rounds, 100) == math.ceil(50 / 16)
    assert asked_steps(job(rounds={"count": 1, "batchSize": 16}).rounds, 100) == 7
    assert asked_steps(job().rounds, 1) == 50
    found = planned(
        facts("a", 8, samples=101), facts("b", 8, samples=3), spec=job(rounds={"count": 1, "batchSize": 16})
    )
    assert (found.nodes["a"].local_steps, found.nodes["b"].local_steps) == (7, 1)


def test_a_plan_in_use_is_kept_until_another_is_clearly_better():
    spec = job(adapter=WIDE, quantization="nf4")
    first = planned(facts("n", 0.9), spec=spec).nodes["n"]
    again = planned(facts("n", 0.91, previous=first), spec=spec).nodes["n"]
    assert planned(facts("n", 0.91), spec=spec).nodes["n"].ranks != first.ranks
    assert (again.ranks, again.precision, again.micro_batch) == (
        first.ranks,
        first.precision,
        first.micro_batch,
    )
    more = planned(facts("n", 2, previous=first), spec=spec).nodes["n"]
    assert set(more.ranks.values()) == {256}
    less = planned(facts("n", 0.87, previous=first), spec=spec).nodes["n"]
    assert less.predicted_bytes < first.predicted_bytes


def test_a_measurement_corrects_the_next_plan():
    request = PlanRequest(BERT, job(), (facts("n", 1.0),), SCORES)
    first = plan(request).nodes["n"]
    net = first.predicted_bytes - 400 * 2**20
    report = wire.ProfileReport(
        step_seconds=2 * first.predicted_step_seconds,
        peak_bytes=400 * 2**20 + round(1.3 * net),
        micro_batch=first.micro_batch,
    )
    calibration = calibrate(request, "n", first, report, remainder=True)
    assert calibration.seconds_factor == pytest.approx(2, rel=0.01)
    assert calibration.bytes_factor >= 1.29
    second = planned(facts("n", 1.0, calibration=calibration)).nodes["n"]
    assert second.predicted_bytes <= 0.9 * GIB
    assert needs_replan(first, report.step_seconds, report.peak_bytes)
    bare = calibrate(request, "n", first, report, remainder=False)
    assert bare.bytes_factor >= calibration.bytes_factor


def test_when_a_plan_is_made_again():
    node = planned(facts("n", 0.9)).nodes["n"]
    step, peak = node.predicted_step_seconds, node.predicted_bytes
    assert needs_replan(node) is None
    assert needs_replan(node, 1.2 * step, 1.05 * peak, 2 * peak) is None
    assert needs_replan(node, 0.7 * step) is None
    assert "a step takes" in needs_replan(node, 1.5 * step)
    assert "a step takes" in needs_replan(node, 0.4 * step)
    assert "peak memory is" in needs_replan(node, peak_bytes=round(1.2 * peak))
    assert "are free; the plan needs" in needs_replan(node, free_memory=peak - 1)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (dict.fromkeys(NAMES[1:], 1.0), f"importance: matrix {NAMES[0]} is missing"),
        (SCORES | {NAMES[3]: math.nan}, f"importance: the score of {NAMES[3]} is nan"),
        (SCORES | {NAMES[3]: math.inf}, f"importance: the score of {NAMES[3]} is inf"),
        (SCORES | {NAMES[3]: -1.0}, f"importance: the score of {NAMES[3]} is -1"),
        (SCORES | {"other": 1.0}, "importance: other is not a candidate matrix"),
    ],
)
def test_bad_scores_are_named(scores, message):
    with pytest.raises(UserError, match=f"^{message}"):
        planned(facts("n", 8), importance=scores)


def test_a_wrong_request_is_named():
    with pytest.raises(UserError, match="nodes: n is given twice"):
        planned(facts("n", 8), facts("n", 4))
    with pytest.raises(UserError, match="headroom: 1 is not a share"):
        planned(facts("n", 8), headroom=1)
    listed = job(adapter={"selection": {"mode": "list", "matrices": [NAMES[0], "bert.query"]}})
    with pytest.raises(UserError, match=r"selection\.matrices: bert\.query is not a candidate"):
        planned(facts("n", 8), spec=listed)


def test_matrices_are_selected_by_mode():
    def selected(mode, seed=0, **changes):
        spec = job(adapter={"selection": {"mode": mode, "keep": 0.25} | changes}, seed=seed)
        return planned(facts("n", 8), spec=spec).selected

    assert selected("all") == NAMES
    assert selected("list", matrices=[NAMES[7], NAMES[2]]) == (NAMES[2], NAMES[7])
    assert selected("importance") == NAMES[36:]
    assert len(selected("random")) == 12
    assert selected("random") == selected("random") != selected("random", seed=1)


def test_before_profiling_the_largest_matrices_stand_for_those_to_come():
    wide = BERT.matrices[5].model_copy(update={"rows": 3072})
    shape = BERT.model_copy(update={"matrices": (*BERT.matrices[:5], wide, *BERT.matrices[6:])})
    found = plan(PlanRequest(shape, job(), (facts("n", 8),)))
    assert found.provisional
    assert wide.name in found.selected
    assert len(found.selected) == 24
    assert "matrices are chosen after profiling" in summary_line(found)
    assert not planned(facts("n", 8)).provisional


def test_a_selection_changes_only_for_a_clearly_better_matrix():
    scores = {"a": 1.0, "b": 0.9, "c": 0.95, "d": 0.1}
    assert select_matrices(scores, 0.5) == ("a", "c")
    assert select_matrices(scores, 0.5, previous=("a", "b")) == ("a", "b")
    assert select_matrices(scores | {"c": 1.2}, 0.5, previous=("a", "b")) == ("a", "c")
    assert select_matrices(scores, 0.01) == ("a",)
    assert select_matrices({"b": 1.0, "a": 1.0}, 0.5) == ("a",)


def test_ranks_to_choose_from():
    assert rank_choices(Ranks(min=2, max=16)) == (2, 4, 8, 16)
    assert rank_choices(Ranks(min=3, max=20)) == (3, 4, 8, 16, 20)
    assert rank_choices(Ranks(min=5, max=5)) == (5,)
    assert rank_choices(Ranks(min=1, max=2)) == (1, 2)


def test_under_training_is_the_share_of_steps_not_done():
    node = planned(facts("n", 8)).nodes["n"]
    node = node.model_copy(update={"local_steps": 50, "predicted_step_seconds": 1.0})
    slow = node.model_copy(update={"predicted_round_seconds": 55.0})
    fast = node.model_copy(update={"predicted_round_seconds": 20.0})
    assert under_training([slow, fast], 25.0) == pytest.approx(0.3)
    assert under_training([slow], 1.0) == 1
    assert under_training([], 1.0) == 0


def test_the_table_shows_what_people_compare():
    found = planned(
        facts("edge-1", 8), facts("edge-2", 0.9), facts("edge-9", 0.1), facts("edge-3", 5, link_rate=10**5)
    )
    first, second, third, last = rows(found)
    assert (first.node, first.precision, first.batch, first.ranks, first.limited_by) == (
        "edge-1",
        "fp32",
        "16",
        "24 matrices, r 16",
        "ranks",
    )
    assert first.memory.endswith(" of 7.2 GiB")
    assert second.memory.endswith(" of 829 MiB") or second.memory.endswith(" of 828 MiB")
    assert third.node == "edge-3"
    assert last.node == "edge-9"
    assert last.precision == last.batch == last.ranks == last.memory == last.round == "–"
    assert last.limited_by.startswith("does not fit: needs ")
    line = summary_line(found)
    assert line.startswith("round deadline 20m · slowest planned node ")
    assert line.endswith(" MB per round · under-training 0 %")
    assert summary_line(planned(facts("n", 0))) == "round deadline 20m · no node fits"


def test_nodes_that_are_the_same_for_all_purposes_get_the_same_plan():
    nodes = [facts(f"n{index}", 0.9 + index * 1e-6, uuid=f"cpu {index}") for index in range(20)]
    found = planned(*nodes)
    assert (
        len({(node.precision, tuple(node.ranks.items()), node.micro_batch) for node in found.nodes.values()})
        == 1
    )
    assert planned(*reversed(nodes)) == found


def test_a_calibration_that_says_less_lowers_little():
    assert Calibration.of((1, 1), (10, 100)).bytes(100) == 75


def test_a_node_with_figures_that_are_hard_to_solve_does_not_hold_the_planner():
    draw = random.Random(1)
    matrices = tuple(
        wire.MatrixShape(
            name=f"m.layer.{index % 12}.x{index}.q",
            rows=draw.randint(64, 3000),
            columns=draw.randint(64, 3000),
        )
        for index in range(300)
    )
    scores = {matrix.name: matrix.rows + matrix.columns + draw.random() * 1e-3 for matrix in matrices}
    spec = job(adapter={"ranks": {"min": 1, "max": 1024}, "selection": {"mode": "all"}})
    model = BERT.model_copy(update={"matrices": matrices})
    started = time.process_time()
    found = plan(PlanRequest(model, spec, (facts("hostile", 1.5),), scores))
    assert list(found.nodes) == ["hostile"]
    assert time.process_time() - started < 30


def timed(**seconds):
    """Kernels of the precisions named, each in multiples of 4 ms beside a float32 product of 4 ms."""
    return tuple(
        wire.KernelResult(
            precision=Precision.of(name), usable=True, seconds=0.004 * times, float32_seconds=0.004
        )
        for name, times in seconds.items()
    )


def test_a_precision_slower_than_float32_is_only_the_last_choice():
    kernels = timed(fp32=1, bf16=9, int8=3, nf4=8)
    for gib, expected in ((8, Precision.FP32), (0.95, Precision.INT8)):
        node = facts("n", gib, kernels=kernels)
        low = job(adapter={"ranks": {"min": 2, "max": 256}})
        assert planned(node, spec=low).nodes["n"].precision is expected
    # Where float32 fits at the lowest ranks it is taken, though bf16 has room for the highest.
    sizes = [round(0.9 + 0.05 * step, 2) for step in range(8)]
    for gib in sizes:
        made = planned(facts("n", gib, kernels=kernels), spec=job(adapter=WIDE))
        alone = planned(facts("n", gib, kernels=timed(fp32=1)), spec=job(adapter=WIDE))
        if alone.nodes and len(alone.nodes["n"].ranks) == len(NAMES):
            assert made.nodes["n"].precision is Precision.FP32, gib


def test_the_slow_precision_of_a_node_that_has_no_other_is_said():
    node = facts("n", 8, kernels=timed(bf16=9))
    made = planned(node).nodes["n"]
    assert made.precision is Precision.BF16
    assert made.reason.endswith("; bf16 is 13 times slower than fp32 there")
    assert slow_line(node.device, Precision.BF16) == "bf16 is 13 times slower than fp32 there"
    fast = planned(facts("n", 8, kernels=timed(bf16=0.6))).nodes["n"]
    assert "slower" not in fast.reason
    assert fast.predicted_step_seconds < made.predicted_step_seconds / 10
