# SPDX-License-Identifier: Apache-2.0
"""Hostile updates in whole rounds: what the robust rules make of them."""

import numpy as np
import pytest

from fedpipe_api.job import Aggregation, Checks, Method, Robust
from fedpipe_api.lora.format import HEAD
from fedpipe_operator.aggregate import low_rank_sum
from property.aggregate_reference import Node, Round, product_of, svd_form
from unit.test_aggregate_round import M, honest, poisoned, verdicts

RULES = ["filtered-mean", "geometric-median", "centered-clipping", "multi-krum"]
NO_CHECKS, MEAN = Checks(mode="none"), Robust(rule="none")


def run(nodes, tmp_path, name="round", start=None, head=None, **aggregation):
    (tmp_path / name).mkdir()
    return Round(nodes, start, head or {}).run(tmp_path / name, Aggregation(**aggregation))


def cosine(left, right):
    return float(np.sum(left * right) / np.linalg.norm(left) / np.linalg.norm(right))


@pytest.mark.parametrize("method", list(Method))
def test_honest_updates_give_the_bytes_of_the_plain_mean(tmp_path, method):
    plain, _ = run(honest(6), tmp_path, "plain", method=method, robust=MEAN, checks=NO_CHECKS)
    found, _ = run(honest(6), tmp_path, method=method)
    assert found.adapter.digest == plain.adapter.digest
    assert not verdicts(found)


@pytest.mark.parametrize("method", list(Method))
@pytest.mark.parametrize(
    ("nodes", "hostile", "factor"), [(5, 1, -10), (11, 3, -1), (11, 3, -10), (10, 4, -1)]
)
def test_flipped_updates_do_not_turn_the_round(tmp_path, method, nodes, hostile, factor):
    """One of five ended at 60 % accuracy; three of eleven turned the change, and the honest were flagged."""
    given = honest(nodes)
    for index in range(hostile):
        poisoned(given, index, factor)
    report, tensors = run(given, tmp_path, method=method)
    assert verdicts(report) == {f"edge-{k}": "rejected" for k in range(hostile)}
    assert all("far below" in report.nodes[f"edge-{k}"].reason for k in range(hostile))
    _, wanted = run(honest(nodes)[hostile:], tmp_path, "clean", method=method)
    assert np.array_equal(product_of(tensors, M), product_of(wanted, M))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("factor", [-10, 1e6])
def test_every_rule_stays_near_the_honest_mean(tmp_path, rule, factor):
    given = honest(10)
    for index in (0, 1):
        poisoned(given, index, factor)
    _, tensors = run(given, tmp_path, robust=Robust(rule=rule), checks=NO_CHECKS)
    _, wanted = run(honest(10)[2:], tmp_path, "clean", robust=MEAN)
    assert cosine(product_of(tensors, M), product_of(wanted, M)) > 0.95
    error = np.linalg.norm(product_of(tensors, M) - product_of(wanted, M))
    assert error < 0.5 * np.linalg.norm(product_of(wanted, M))


def test_a_negated_mean_of_huge_weight_has_no_honest_update_rejected(tmp_path):
    given = poisoned(honest(9), 4, -1)
    given[4].samples = 10**12
    report, _ = run(given, tmp_path, checks=Checks(mode="reject"), robust=MEAN)
    assert verdicts(report) == {"edge-4": "rejected"}


@pytest.mark.parametrize("robust", [Robust(), Robust(head="median"), Robust(head="trimmed-mean")])
@pytest.mark.parametrize("first", [True, False])
def test_a_turned_head_is_bounded_also_in_the_first_round(tmp_path, robust, first):
    random = np.random.default_rng(0)
    before = random.standard_normal((3, 12)).astype(np.float32)
    nodes = honest(10)
    for index, node in enumerate(nodes):
        change = np.float32(1 + 0.3 * random.standard_normal(before.shape))
        node.head = {"classifier.weight": before + change * (-50 if index < 2 else 1)}
    start = None if first else {M: svd_form(random.standard_normal((20, 12)), 3)}
    _, tensors = run(nodes, tmp_path, start=start, head={"classifier.weight": before}, robust=robust)
    change = tensors[HEAD + "classifier.weight"] - before
    # At worst two of ten count as turned updates of ordinary size.
    assert change.mean() > 0.5


@pytest.mark.parametrize("head", ["median", "trimmed-mean"])
def test_entries_of_a_head_are_their_median_or_trimmed_mean(tmp_path, head):
    random = np.random.default_rng(0)
    before = random.standard_normal((4, 5)).astype(np.float32)
    nodes = honest(7)
    for node in nodes:
        node.head = {"w": before + random.standard_normal(before.shape).astype(np.float32)}
    start = {M: svd_form(random.standard_normal((20, 12)), 3)}
    robust = Robust(rule="none", head=head, byzantine=0.3)
    _, tensors = run(nodes, tmp_path, start=start, head={"w": before}, robust=robust)
    values = np.sort(np.stack([node.head["w"] for node in nodes]).astype(float), axis=0)
    wanted = values[3] if head == "median" else values[2:5].mean(axis=0)
    np.testing.assert_allclose(tensors[HEAD + "w"], wanted, rtol=1e-5, atol=1e-6)


def test_many_folded_nodes_are_judged_by_sketches(tmp_path, monkeypatch):
    monkeypatch.setattr(low_rank_sum, "FOLD_ROOM", 64)
    monkeypatch.setattr(low_rank_sum, "FOLD_KEEP", 24)
    given = honest(30, rows=300, columns=200)
    for index in range(9):
        poisoned(given, index, -1)
    report, _ = run(given, tmp_path)
    assert verdicts(report) == {f"edge-{k}": "rejected" for k in range(9)}
    exact, _ = run(given, tmp_path, "zero-pad", method=Method.ZERO_PAD)
    assert verdicts(exact) == verdicts(report)


def test_a_node_that_trained_other_matrices_is_judged_on_what_is_shared(tmp_path):
    random = np.random.default_rng(1)
    common = {
        name: (random.standard_normal((20, 4)), random.standard_normal((4, 12))) for name in ("a", "b", "c")
    }
    nodes = []
    for index in range(8):
        held = ["a", "b", "c"] if index % 2 else ["a"] if index % 4 else ["b", "c"]
        factors = {
            name: tuple(np.float32(part + 0.3 * random.standard_normal(part.shape)) for part in common[name])
            for name in held
        }
        nodes.append(Node(f"edge-{index}", 100, factors))
    report, _ = run(nodes, tmp_path)
    assert not verdicts(report)
    for name, (left, right) in nodes[2].factors.items():
        nodes[2].factors[name] = (-left, right)
    report, _ = run(nodes, tmp_path, "turned")
    assert verdicts(report) == {"edge-2": "rejected"}
