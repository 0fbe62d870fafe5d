# SPDX-License-Identifier: Apache-2.0
"""The paper comparison's arithmetic: BLEU, the virtual clock, and what systems ask of nodes."""

import math
from typing import Any

import pytest

from bench.paper_bleu import bleu
from bench.paper_fleet import KINDS, ORIN, common, deadline, device, round_seconds, share, under_training
from bench.paper_systems import SYSTEMS, Request, assign, spec_of
from bench.paper_tasks import Scenario, Setting, job
from fedpipe_api import wire
from fedpipe_operator.planner import speed, training_memory
from fedpipe_operator.planner.workload import workload

SETTING = Setting(rounds=10)
SHAPE = wire.ModelShape(
    architecture="bert",
    layers=6,
    hidden=384,
    heads=12,
    key_value_heads=12,
    intermediate=1536,
    vocabulary=30522,
    causal=False,
    parameters=22_713_216,
    linear_parameters=10_764_672,
    matrices=tuple(
        wire.MatrixShape(name=f"bert.encoder.layer.{layer}.attention.self.{part}", rows=384, columns=384)
        for layer in range(6)
        for part in ("query", "key", "value")
    ),
    head=(wire.TensorShape(name="classifier.weight", shape=(20, 384)),),
)
SPEC = job(Scenario("news", "heterogeneous", "iid", "fedpipe", 0), SETTING, ["a", "b"])


# BLEU


def test_bleu_by_hand() -> None:
    # Clipped by the reference that has most: 6 of 7 words ("the" counts twice), 5 of 6 pairs ("the cat" once),
    # 3 of 5 triples, 1 of 4 fours; longer than both references, so no brevity penalty.
    found = bleu(["the cat the cat on the mat"], [["the cat is on the mat", "a cat the cat on mats"]])
    assert math.isclose(found, (6 / 7 * 5 / 6 * 3 / 5 * 1 / 4) ** 0.25)


def test_bleu_of_a_short_text_pays_for_brevity() -> None:
    found = bleu(["a b c d"], [["a b c d e f"]])
    assert math.isclose(found, math.exp(1 - 6 / 4))


def test_bleu_takes_the_closest_length_and_the_whole_corpus() -> None:
    assert bleu(["A b, c d."], [["x", "a b , c d ."]]) == 1.0
    half = bleu(["a b c d", "v w x y"], [["a b c d"], ["k l m n"]])
    assert math.isclose(half, (4 / 8 * 3 / 6 * 2 / 4 * 1 / 2) ** 0.25)
    assert bleu(["a b"], [["a b"]]) == 0.0  # no 4-gram at all


# The virtual clock


def test_a_node_does_what_fits_before_the_deadline() -> None:
    part = share(download=1.0, step=0.5, upload=0.5, planned=10, limit=4.0)
    assert part.done == 5
    assert part.seconds == 4.0
    assert share(1.0, 0.5, 0.5, 3, 4.0).seconds == 3.0
    assert share(3.0, 0.5, 2.0, 3, 4.0).done == 0
    assert share(1.0, 0.5, 0.5, 7, math.inf).done == 7


def test_a_round_lasts_as_long_as_its_slowest_node() -> None:
    quick, slow = share(0.1, 0.1, 0.1, 10, 4.0), share(1.0, 0.9, 0.5, 10, 4.0)
    assert math.isclose(round_seconds([quick, slow], 4.0), slow.seconds)
    silent = share(3.0, 2.0, 2.0, 10, 4.0)
    assert round_seconds([quick, silent], 4.0) == 4.0


def test_under_training_counts_nodes_left_out() -> None:
    shares = {"a": share(0, 1, 0, 10, 4.0), "b": share(0, 0.1, 0, 10, 4.0)}
    assert under_training(shares, left_out=2, asked=10) == (40, 14)


def test_declared_memory_carries_the_kinds_rank() -> None:
    work = workload(SHAPE, SPEC, SHAPE.matrices)
    configuration, lowest = common(KINDS.values(), work.batch)
    assert (configuration.micro_batch, lowest) == (ORIN.micro_batch, ORIN.rank)
    for kind in KINDS.values():
        facts = device(kind, SHAPE, SPEC)
        ranks = dict.fromkeys(work.sides, kind.rank)
        assert training_memory.peak_bytes(work, facts, configuration, ranks) <= training_memory.budget(
            facts, 0.1
        )


def test_the_deadline_lets_the_slowest_do_a_quarter() -> None:
    work = workload(SHAPE, spec_of(SYSTEMS["fedit"], SPEC, 8), SHAPE.matrices)
    facts = device(ORIN, SHAPE, SPEC)
    configuration, rank = common((ORIN,), work.batch)
    ranks = dict.fromkeys(work.sides, rank)
    moved = speed.transfer_time(facts, speed.upload_bytes(work, ranks))
    step = speed.step_time(work, facts, configuration, ranks)
    limit = deadline(SHAPE, SPEC, 40)
    assert share(moved, step, moved, 40, limit + 1e-3).done == 10


# What systems ask of nodes


def _assigned(name: str) -> Any:
    limit = deadline(SHAPE, SPEC, SETTING.steps)
    spec = SPEC.model_copy(update={"rounds": SPEC.rounds.model_copy(update={"deadline": limit})})
    nodes = [f"{kind}-{index}" for index, kind in enumerate(KINDS)]
    devices = {node: device(KINDS[node.rpartition("-")[0]], SHAPE, spec) for node in nodes}
    system = SYSTEMS[name]
    request = Request(system, SHAPE, spec_of(system, spec, 8), dict.fromkeys(nodes, 300), devices)
    return assign(request), devices


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name != "centralised"])
def test_every_system_keeps_to_the_nodes_memory(name: str) -> None:
    assigned, devices = _assigned(name)
    assert len(assigned.nodes) + len(assigned.left_out) == len(devices)
    for node, plan in assigned.nodes.items():
        assert plan.predicted_bytes <= training_memory.budget(devices[node], 0.1)
        assert plan.micro_batch * plan.accumulation == SETTING.batch


def test_baselines_are_alike_where_they_should_be() -> None:
    fedit, _ = _assigned("fedit")
    assert {rank for plan in fedit.nodes.values() for rank in plan.ranks.values()} == {ORIN.rank}
    stack, _ = _assigned("stack")
    ranks = [set(plan.ranks.values()) for plan in stack.nodes.values()]
    assert ranks == [{kind.rank} for kind in KINDS.values()]
    vanilla, _ = _assigned("vanilla")
    assert set(vanilla.left_out) >= {"orin-0"}
    uniform, _ = _assigned("no-heterogeneity")
    assert len({(plan.micro_batch, *plan.ranks.values()) for plan in uniform.nodes.values()}) == 1
