# SPDX-License-Identifier: Apache-2.0
"""Plans against brute force, limits, and monotonicity."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedpipe_api import wire
from fedpipe_api.job import FedPipeJobSpec, Precision
from fedpipe_operator.planner import Calibration, NodeFacts, PlanRequest, plan, speed, training_memory
from fedpipe_operator.planner.node_plan import (
    SPEED_VALUE,
    STEPS_FOR_RANKS,
    UNTRAINED_PENALTY,
)
from fedpipe_operator.planner.programme import Programme
from fedpipe_operator.planner.workload import Configuration, workload

MIB = 2**20
RANKS = (2, 4, 8)


def model(matrices, hidden=64, layers=2):
    """A model small enough that ranks weigh against activations."""
    return wire.ModelShape(
        architecture="bert",
        layers=layers,
        hidden=hidden,
        heads=4,
        key_value_heads=4,
        intermediate=4 * hidden,
        vocabulary=1000,
        causal=False,
        parameters=200_000 + sum(rows * columns for rows, columns in matrices),
        linear_parameters=100_000,
        matrices=tuple(
            wire.MatrixShape(
                name=f"bert.encoder.layer.{index % layers}.m{index}.query", rows=rows, columns=columns
            )
            for index, (rows, columns) in enumerate(matrices)
        ),
        head=(wire.TensorShape(name="classifier.weight", shape=(4, hidden)),),
    )


def job(**changes):
    document = {
        "model": {"hostPath": {"path": "/m"}, "task": "sequence-classification", "labels": ["a", "b"]},
        "data": {"volume": {"hostPath": {"path": "/d"}}, "train": "t.jsonl", "maxLength": 16},
        "rounds": {"count": 1, "localSteps": 10, "batchSize": 4, "deadline": "60s"},
        "adapter": {"ranks": {"min": RANKS[0], "max": RANKS[-1]}, "selection": {"mode": "all"}},
    }
    for name, value in changes.items():
        document[name] = document.get(name, {}) | value if isinstance(value, dict) else value
    return FedPipeJobSpec.model_validate(document)


def device(**changes):
    facts = {
        "kind": "cpu",
        "name": "cpu",
        "free_memory": 1024 * MIB,
        "overhead": 100 * MIB,
        "threads": 1,
        "speed": 1.0,
        "link_rate": 10**6,
        "kernels": tuple(
            wire.KernelResult(precision=precision, usable=True, seconds=seconds, float32_seconds=0.006)
            for precision, seconds in zip(Precision, (0.006, 0.004, 0.008, 0.01), strict=True)
        ),
    }
    return wire.DeviceFacts(**(facts | changes))


def figures(work, facts, configuration, ranks, calibration=None):
    """Peak bytes, step seconds and other seconds of a round, by the models."""
    peak = training_memory.peak_bytes(work, facts, configuration, ranks, calibration)
    step = speed.step_time(work, facts, configuration, ranks, calibration)
    moved = speed.download_bytes(work) + speed.upload_bytes(work, ranks)
    return peak, step, speed.transfer_time(facts, moved)


def step_times(work, facts):
    return {
        (precision, size, again): speed.fixed_time(work, facts, Configuration(precision, size, again))
        for precision in Precision
        for size in (1, 2, 4)
        for again in (False, True)
    }


def worth(times, importance, configuration, ranks):
    """What a plan is worth, written down once more from METHOD §2."""
    total = sum(importance.values())
    value = sum(
        importance[name] / total * math.log2(1 + ranks[name]) / math.log2(1 + RANKS[-1])
        if name in ranks
        else -UNTRAINED_PENALTY
        for name in importance
    )
    own = times[configuration.precision, configuration.micro_batch, configuration.checkpointing]
    value -= {Precision.INT8: 1.2 * (1 + math.log2(6 / 4)), Precision.NF4: 1.2 * 2}.get(
        configuration.precision, 0
    )
    return value + configuration.precision.worth + SPEED_VALUE * min(times.values()) / own


def brute_force(spec, shape, facts, importance, headroom):
    """The best (steps, worth) of every configuration and every choice of ranks; None if nothing fits."""
    budget, seconds = training_memory.budget(facts, headroom), spec.rounds.deadline * (1 - headroom)
    work = workload(shape, spec, shape.matrices)
    times, names = step_times(work, facts), list(importance)
    everything = []
    for precision, size, again in itertools.product(Precision, (1, 2, 4), (False, True)):
        configuration = Configuration(precision, size, again)
        for chosen in itertools.product((0, *RANKS), repeat=len(names)):
            ranks = {name: rank for name, rank in zip(names, chosen, strict=True) if rank}
            if not ranks:
                continue
            peak, step, other = figures(work, facts, configuration, ranks)
            if peak <= budget:
                fit = math.floor((seconds - other) / step + 1e-9)
                everything.append((configuration, ranks, fit))
    if not everything:
        return None
    lowest = dict.fromkeys(names, RANKS[0])
    configurations = {entry[0] for entry in everything}
    whole = {entry[0] for entry in everything if len(entry[1]) == len(names)}
    possible = 0
    for configuration in whole or configurations:
        _, step, other = figures(work, facts, configuration, lowest)
        possible = max(possible, math.floor((seconds - other) / step + 1e-9))
    if possible < 1:
        return None
    asked = spec.rounds.local_steps
    steps = asked if possible >= asked else max(1, math.floor(STEPS_FOR_RANKS * possible))
    best = max(
        worth(times, importance, configuration, ranks)
        for configuration, ranks, fit in everything
        if fit >= steps and (not whole or len(ranks) == len(names))
    )
    return steps, best


sizes = st.sampled_from([(64, 64), (256, 64), (2048, 2048), (65536, 16384), (16384, 32768)])


@settings(max_examples=40, deadline=None)
@given(
    matrices=st.lists(sizes, min_size=1, max_size=2),
    scores=st.lists(st.floats(0.01, 10), min_size=2, max_size=2),
    room=st.integers(0, 60),
    pace=st.floats(0.2, 30),
)
def test_a_plan_is_the_best_of_all_that_fit(matrices, scores, room, pace):
    shape, spec = model(matrices), job(aggregation={"method": "zero-pad"})
    importance = {matrix.name: score for matrix, score in zip(shape.matrices, scores, strict=False)}
    work = workload(shape, spec, shape.matrices)
    least = min(
        training_memory.fixed_bytes(work, device(), Configuration(precision, 1, True))
        for precision in Precision
    )
    fastest = speed.fixed_time(work, device(), Configuration(Precision.BF16, 4))
    facts = device(
        free_memory=device().overhead + least + room * MIB // 8,
        speed=min(1.0, 10 * fastest * pace / 60),
        link_rate=None,
    )
    request = PlanRequest(shape, spec, (NodeFacts("n", facts, 100),), importance, headroom=0.0)
    found = plan(request)
    best = brute_force(spec, shape, facts, importance, 0.0)
    if best is None:
        assert list(found.left_out) == ["n"]
        return
    node = found.nodes["n"]
    configuration = Configuration(node.precision, node.micro_batch, node.checkpointing)
    assert node.local_steps == best[0]
    assert worth(step_times(work, facts), importance, configuration, node.ranks) == pytest.approx(
        best[1], abs=1e-7
    )


facts_of_nodes = st.builds(
    lambda mib, overhead, speed_, link, threads: device(
        free_memory=mib * MIB, overhead=overhead * MIB, speed=speed_, link_rate=link, threads=threads
    ),
    st.integers(0, 2000),
    st.integers(0, 700),
    st.floats(0.001, 1),
    st.none() | st.integers(1000, 10**8),
    st.integers(1, 16),
)
calibrations = st.none() | st.builds(
    Calibration, st.floats(0.01, 100), st.floats(0.75, 3), st.integers(-50 * MIB, 300 * MIB)
)


@settings(max_examples=60, deadline=None)
@given(
    nodes=st.lists(st.tuples(facts_of_nodes, calibrations, st.integers(1, 5000)), min_size=1, max_size=6),
    matrices=st.lists(sizes, min_size=1, max_size=12),
    deadline=st.sampled_from(["1s", "20s", "10m"]),
    steps=st.sampled_from([{"localSteps": 7}, {"localEpochs": 0.5}, {}]),
    method=st.sampled_from(["exact", "average", "stack", "zero-pad"]),
)
def test_no_plan_breaks_a_limit(nodes, matrices, deadline, steps, method):
    shape = model(matrices)
    spec = job(
        rounds={"localSteps": None, "deadline": deadline} | steps,
        aggregation={"method": method},
    )
    facts = tuple(
        NodeFacts(f"n{index}", facts, samples, 10, calibration)
        for index, (facts, calibration, samples) in enumerate(nodes)
    )
    found = plan(PlanRequest(shape, spec, facts))
    work = workload(shape, spec, shape.matrices)
    assert sorted([*found.nodes, *found.left_out]) == sorted(node.name for node in facts)
    assert found.under_training == 0
    if method == "average":
        assert len({rank for node in found.nodes.values() for rank in node.ranks.values()}) <= 1
    for node in facts:
        if node.name in found.left_out:
            assert found.left_out[node.name]
            continue
        planned = found.nodes[node.name]
        asked = spec.rounds.local_steps or math.ceil((spec.rounds.local_epochs or 1) * node.samples / 4)
        configuration = Configuration(planned.precision, planned.micro_batch, planned.checkpointing)
        peak, step, other = figures(work, node.device, configuration, planned.ranks, node.calibration)
        assert planned.predicted_bytes == peak <= 0.9 * node.device.free_memory
        assert planned.predicted_step_seconds == pytest.approx(step)
        assert planned.local_steps * step + other <= planned.predicted_round_seconds * (1 + 1e-9)
        assert planned.predicted_round_seconds <= 0.9 * spec.rounds.deadline * (1 + 1e-9)
        assert 1 <= planned.local_steps <= asked
        assert planned.micro_batch * planned.accumulation == spec.rounds.batch_size
        assert planned.ranks
        assert set(planned.ranks.values()) <= set(RANKS)
        assert planned.limited_by in ("memory", "time", "ranks")
        assert planned.limited_by == "time" or planned.local_steps == asked


@settings(max_examples=40, deadline=None)
@given(
    matrices=st.lists(sizes, min_size=1, max_size=6),
    room=st.integers(100, 600),
    more=st.integers(0, 300),
    pace=st.floats(0.001, 1),
)
def test_more_memory_never_makes_a_plan_worse(matrices, room, more, pace):
    shape, spec = model(matrices), job()
    importance = {matrix.name: 1.0 + index for index, matrix in enumerate(shape.matrices)}
    work = workload(shape, spec, shape.matrices)
    reached = []
    for mib in (room, room + more):
        facts = device(free_memory=mib * MIB, speed=pace)
        found = plan(PlanRequest(shape, spec, (NodeFacts("n", facts, 100),), importance))
        if "n" in found.left_out:
            reached.append((0, -math.inf))
            continue
        node = found.nodes["n"]
        configuration = Configuration(node.precision, node.micro_batch, node.checkpointing)
        reached.append(
            (node.local_steps, worth(step_times(work, facts), importance, configuration, node.ranks))
        )
    assert reached[1][0] >= reached[0][0]
    if reached[1][0] == reached[0][0]:
        assert reached[1][1] >= reached[0][1] - 1e-7


@settings(max_examples=100, deadline=None)
@given(data=st.data(), matrices=st.integers(1, 4), options=st.integers(1, 4), limits=st.integers(1, 2))
def test_the_programme_is_solved_exactly_and_bounded(data, matrices, options, limits):
    steps = st.floats(0, 10).map(lambda number: round(number, 3))

    def rising(count):
        return np.cumsum(
            np.array(data.draw(st.lists(steps, min_size=count, max_size=count))).reshape(-1, options), axis=1
        )

    values = rising(matrices * options)
    costs = np.stack([rising(matrices * options) for _ in range(limits)])
    programme = Programme(values, costs, np.array([data.draw(st.floats(-1, 60)) for _ in range(limits)]))
    best = max(
        (
            programme.total(np.array(choice))[0]
            for choice in itertools.product(range(options), repeat=matrices)
            if programme.fits(np.array(choice))
        ),
        default=None,
    )
    found = programme.solve()
    if best is None:
        assert found is None
        return
    assert programme.fits(found)
    assert programme.total(found)[0] == pytest.approx(best, abs=1e-6)
    assert programme.bound() >= best - 1e-9


@settings(max_examples=100, deadline=None)
@given(
    worth=st.lists(st.floats(0, 10), min_size=3, max_size=3),
    prices=st.tuples(st.floats(0.01, 1e6), st.floats(0.01, 1e6)),
    limits=st.tuples(st.floats(0, 50), st.floats(0, 50)),
)
@example(worth=[1.0, 2.0, 2.0], prices=(1.0, 1.0), limits=(16.0, 16.0))
@example(worth=[0.0, 0.0, 1.0], prices=(1.0, 349525.75439405825), limits=(20.0, 20.0))
def test_counting_in_steps_of_cost_changes_no_optimum(worth, prices, limits):
    ranks = np.array([[2.0, 4.0, 8.0]] * len(worth))
    programme = Programme(
        np.array(worth)[:, None] * np.log2(1 + ranks),
        np.stack([price * ranks for price in prices]),
        # A sum of costs may be rounded above a limit that it meets exactly.
        np.array(limits) * prices * (1 + 1e-12),
    )
    counted, known = programme.in_steps(), {}
    assert len(counted.limits) == 1
    found = programme.solve()
    for _ in range(2):
        again = counted.solve(known=known)
        assert (again is None) == (found is None)
        if found is not None:
            assert programme.fits(again)
            assert counted.bound() >= counted.total(again)[0] - 1e-9
            assert programme.total(again)[0] == pytest.approx(programme.total(found)[0], abs=1e-6)
    assert len(known) <= 1


@given(
    predicted=st.integers(1, 2**34),
    measured=st.integers(1, 2**34),
    seconds=st.tuples(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3)),
    limit=st.integers(0, 2**35),
)
def test_a_calibration_meets_its_measurement_and_is_undone(predicted, measured, seconds, limit):
    calibration = Calibration.of(seconds, (measured, predicted))
    assert calibration.bytes(predicted) >= min(measured, 2**34)
    if measured >= predicted:
        assert calibration.bytes(predicted) <= measured + 1 + measured * 1e-9
    assert calibration.seconds_factor * seconds[1] == pytest.approx(seconds[0])
    allowed = calibration.uncorrected(limit)
    assert calibration.bytes(allowed) <= limit + 1
