# SPDX-License-Identifier: Apache-2.0
"""Robust means from inner products against the same rules on dense float64 vectors (METHOD §5)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpipe_operator.aggregate.comparison import Comparison, Products
from fedpipe_operator.aggregate.robust import (
    centered_clipping,
    far_cosines,
    far_norms,
    geometric_median,
    multi_krum,
    near_copies,
)

examples = settings(max_examples=100, deadline=None)
RULES = {
    "geometric-median": geometric_median,
    "centered-clipping": centered_clipping,
    "multi-krum": lambda products, weights: multi_krum(products, weights, len(weights) // 4),
}


@st.composite
def changes(draw, fewest: int = 3):
    """Return changes (K, n) and weights (K,)."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    nodes, length = draw(st.integers(fewest, 9)), draw(st.integers(2, 12))
    vectors = random.standard_normal((nodes, length)) + draw(st.sampled_from([0.0, 1.0])) * np.ones(length)
    return vectors, random.uniform(0.2, 3, nodes)


def mean_of(rule, vectors, weights):
    coefficients = RULES[rule](vectors @ vectors.T, weights)
    assert (coefficients >= 0).all()
    assert coefficients.sum() == pytest.approx(1)
    return coefficients @ vectors


@examples
@given(changes())
def test_the_geometric_median_is_where_the_weighted_distances_are_least(given_changes):
    vectors, weights = given_changes
    found = mean_of("geometric-median", vectors, weights)

    def cost(point):
        return weights @ np.linalg.norm(vectors - point, axis=1)

    point = weights @ vectors / weights.sum()
    for _ in range(2000):
        share = weights / np.maximum(np.linalg.norm(vectors - point, axis=1), 1e-12)
        point = share @ vectors / share.sum()
    assert cost(found) <= cost(point) * (1 + 1e-3)


@examples
@given(changes())
def test_centered_clipping_equals_a_dense_one(given_changes):
    vectors, weights = given_changes
    centre = mean_of("geometric-median", vectors, np.ones(len(vectors)))
    radius = np.median(np.linalg.norm(vectors - centre, axis=1))
    for _ in range(3):
        apart = np.linalg.norm(vectors - centre, axis=1)
        steps = (vectors - centre) * np.minimum(1, radius / np.maximum(apart, 1e-300))[:, None]
        centre = centre + weights / weights.sum() @ steps
    np.testing.assert_allclose(mean_of("centered-clipping", vectors, weights), centre, atol=1e-6)


@examples
@given(changes(fewest=5))
def test_multi_krum_equals_a_dense_one(given_changes):
    vectors, weights = given_changes
    count = len(vectors)
    byzantine = min(count // 4, (count - 3) // 2)
    scores = []
    for vector in vectors:
        apart = sorted(np.sum((vectors - vector) ** 2, axis=1))[1:]
        scores.append(sum(apart[: count - byzantine - 2]))
    best = sorted(range(count), key=lambda k: scores[k])[: count - byzantine]
    wanted = weights[best] @ vectors[best] / weights[best].sum()
    np.testing.assert_allclose(mean_of("multi-krum", vectors, weights), wanted, atol=1e-9)


@pytest.mark.parametrize("rule", RULES)
@examples
@given(given_changes=changes(fewest=5), seed=st.integers(0, 1000))
def test_the_order_of_the_nodes_does_not_matter(rule, given_changes, seed):
    vectors, weights = given_changes
    order = np.random.default_rng(seed).permutation(len(vectors))
    expected = mean_of(rule, vectors, weights)
    np.testing.assert_allclose(mean_of(rule, vectors[order], weights[order]), expected, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
@examples
@given(
    seed=st.integers(0, 10**6), nodes=st.integers(7, 15), size=st.sampled_from([1.0, 1e3, 1e9, 1e30]),
    together=st.booleans(),
)  # fmt: skip
def test_a_quarter_of_arbitrary_size_moves_the_result_by_a_bound(rule, seed, nodes, size, together):
    random = np.random.default_rng(seed)
    vectors = np.ones(20) + 0.5 * random.standard_normal((nodes, 20))
    hostile = nodes // 4
    attack = random.standard_normal((1 if together else hostile, 20))
    vectors[:hostile] = size * attack
    honest = vectors[hostile:]
    spread = np.linalg.norm(honest - honest.mean(axis=0), axis=1).max()
    moved = np.linalg.norm(mean_of(rule, vectors, np.ones(nodes)) - honest.mean(axis=0))
    assert moved < 3 * spread


@pytest.mark.parametrize("rule", RULES)
def test_without_attackers_the_result_is_the_mean_within_its_own_error(rule):
    """Of 20 honest nodes the mean itself errs by spread / √20 of what all nodes of the world would give."""
    errors, own = [], []
    for seed in range(30):
        vectors = np.ones(50) + np.random.default_rng(seed).standard_normal((20, 50))
        errors.append(np.linalg.norm(mean_of(rule, vectors, np.ones(20)) - 1))
        own.append(np.linalg.norm(vectors.mean(axis=0) - 1))
    assert np.mean(errors) < 1.3 * np.mean(own)


@examples
@given(st.integers(0, 10**6), st.integers(5, 30))
def test_honest_updates_are_seldom_outliers(seed, nodes):
    random = np.random.default_rng(seed)
    vectors = np.ones(200) + 2 * random.standard_normal((nodes, 200))
    vectors *= random.uniform(0.4, 1.2, nodes)[:, None]
    found = comparison_of([(list(range(nodes)), vectors)], nodes)
    assert not far_norms(found.norms)[0].any()
    assert not far_cosines(found.median_cosines(range(nodes)))[0].any()


@pytest.mark.parametrize("nodes", [3, 4, 5, 6, 8, 10, 30])
@pytest.mark.parametrize("spread", [0.03, 0.1, 0.3])
def test_nodes_that_agree_little_are_no_outliers(nodes, spread):
    """In late rounds honest cosines scatter about 0: one of four was left out at -0.19."""
    random = np.random.default_rng(0)
    rounds = np.clip(0.03 + spread * random.standard_normal((1000, nodes)), -1, 1)
    assert sum(far_cosines(cosines)[0].any() for cosines in rounds) <= 25


@examples
@given(st.integers(0, 10**6), st.integers(5, 30), st.sampled_from([1.0, 10.0, 1e20]))
def test_fewer_than_half_that_point_away_are_found_and_no_other(seed, nodes, size):
    random = np.random.default_rng(seed)
    vectors = np.ones(400) + 1.5 * random.standard_normal((nodes, 400))
    hostile = (nodes - 1) * 2 // 5
    vectors[:hostile] *= -size
    found = comparison_of([(list(range(nodes)), vectors)], nodes)
    away, _ = far_cosines(found.median_cosines(range(nodes)))
    assert away.tolist() == [k < hostile for k in range(nodes)]


@examples
@given(st.integers(0, 10**6), st.integers(6, 20), st.sampled_from([0.3, 1.0, 3.0]))
def test_copies_are_found_and_updates_of_their_own_data_are_not(seed, nodes, noise):
    random = np.random.default_rng(seed)
    vectors = np.ones(400) + noise * random.standard_normal((nodes, 400))
    found = comparison_of([(list(range(nodes)), vectors)], nodes)
    assert not near_copies(found.cosines()).any()
    copies = (nodes - 1) // 2
    drawn = np.ones(400) + noise * random.standard_normal(400)
    vectors[:copies] = drawn + 0.05 * noise * random.standard_normal((copies, 400))
    found = comparison_of([(list(range(nodes)), vectors)], nodes)
    assert near_copies(found.cosines()).tolist() == [k < copies and copies > 1 for k in range(nodes)]


def comparison_of(tensors, nodes):
    found = Comparison(nodes)
    for trained, vectors in tensors:
        found.add(Products(trained, vectors @ vectors.T))
    return found


@examples
@given(st.integers(0, 10**6))
def test_pairs_are_compared_on_what_both_trained(seed):
    random = np.random.default_rng(seed)
    nodes = 5
    tensors = []
    for _ in range(4):
        trained = [k for k in range(nodes) if random.random() < 0.7]
        tensors.append((trained, random.standard_normal((len(trained), 6))))
    found = comparison_of(tensors, nodes)
    complete, cosines = found.complete(), found.cosines()
    for i in range(nodes):
        for j in range(nodes):
            both = [(v[t.index(i)], v[t.index(j)]) for t, v in tensors if i in t and j in t]
            own = [sum(v[t.index(k)] @ v[t.index(k)] for t, v in tensors if k in t) for k in (i, j)]
            if i == j:
                assert complete[i, i] == pytest.approx(own[0])
                continue
            if not both:
                assert complete[i, j] == 0
                assert np.isnan(cosines[i, j])
                continue
            a, b = (np.concatenate(side) for side in zip(*both, strict=True))
            assert cosines[i, j] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
            # As far apart, relative to their sizes, as on what both trained.
            share = np.sum((a - b) ** 2) / (a @ a + b @ b)
            assert own[0] + own[1] - 2 * complete[i, j] == pytest.approx(share * (own[0] + own[1]))
