# SPDX-License-Identifier: Apache-2.0
"""Every aggregation rule against dense float64 matrices (METHOD §4)."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpipe_api.job import Aggregation, Checks, Method, Robust, ServerOptimizer
from fedpipe_api.lora.format import HEAD, LORA_A, LORA_B
from fedpipe_operator.aggregate import low_rank_sum
from fedpipe_operator.aggregate.sketches import probes
from property.aggregate_reference import MATRICES, Node, Round, product_of, rounds, svd_form

NO_CHECKS, MEAN = Checks(mode="none"), Robust(rule="none")
SVD_METHODS = (Method.EXACT, Method.TRUNCATE, Method.STACK)
examples = settings(max_examples=60, deadline=None)


def run(federated_round: Round, **settings_of_aggregation):
    with tempfile.TemporaryDirectory() as directory:
        aggregation = Aggregation(**{"checks": NO_CHECKS, "robust": MEAN} | settings_of_aggregation)
        return federated_round.run(Path(directory), aggregation)


def size_of(federated_round: Round, name: str) -> float:
    """Return the size of what is added up: rounding is relative to it where the sum nearly vanishes."""
    parts = [
        w * np.linalg.norm(federated_round.product(node, name)) for node, w in federated_round.trained(name)
    ]
    return sum(parts) + np.linalg.norm(federated_round.dense_start(name))


def dense_result(federated_round: Round, name: str, method: Method) -> np.ndarray:
    if method is Method.TRUNCATE:
        return sum(w * federated_round.product(node, name) for node, w in federated_round.trained(name))
    return federated_round.target(name, method)


@pytest.mark.parametrize("method", SVD_METHODS)
@examples
@given(federated_round=rounds())
def test_factor_space_equals_dense(method, federated_round):
    report, tensors = run(federated_round, method=method, max_global_rank=64)
    for name in federated_round.matrices:
        if not federated_round.trained(name):
            assert np.array_equal(tensors[name + LORA_B], federated_round.start[name][0])
            assert np.array_equal(tensors[name + LORA_A], federated_round.start[name][1])
            assert name not in report.matrices
            continue
        wanted = dense_result(federated_round, name, method)
        error = np.linalg.norm(product_of(tensors, name) - wanted)
        assert error <= 1e-6 * np.linalg.norm(wanted) + 1e-9 * size_of(federated_round, name)
        assert report.matrices[name].discarded_energy < 1e-9


@pytest.mark.parametrize("method", SVD_METHODS)
@examples
@given(federated_round=rounds(), max_rank=st.integers(1, 4))
def test_truncation_is_the_best_one_and_is_reported(method, federated_round, max_rank):
    report, tensors = run(federated_round, method=method, max_global_rank=max_rank)
    for name, found in report.matrices.items():
        full = dense_result(federated_round, name, method)
        size = size_of(federated_round, name)
        sigma = np.linalg.svd(full, compute_uv=False)
        if sigma[0] <= 1e-6 * size:
            continue
        stored = product_of(tensors, name)
        best = float(np.sqrt(np.sum(sigma[max_rank:] ** 2)))
        assert np.linalg.norm(stored - full) <= best + 1e-6 * size
        assert found.discarded_energy == pytest.approx(best**2 / np.sum(sigma**2), abs=1e-6)
        target = federated_round.target(name, method)
        error = np.linalg.norm(stored - target) / np.linalg.norm(target)
        assert found.relative_error == pytest.approx(
            error, rel=0.01, abs=1e-6 * size / np.linalg.norm(target)
        )
        kept = np.linalg.svd(stored, compute_uv=False)[: found.rank]
        share = kept**2 / np.sum(kept**2)
        share = share[share > 1e-13]
        assert found.effective_rank == pytest.approx(np.exp(-np.sum(share * np.log(share))), rel=1e-3)
        assert found.spectrum == pytest.approx(kept[:16], rel=1e-4, abs=1e-6 * kept[0])


@pytest.mark.parametrize("method", SVD_METHODS)
@examples
@given(federated_round=rounds())
def test_the_global_adapter_is_in_svd_form(method, federated_round):
    report, tensors = run(federated_round, method=method, max_global_rank=5)
    for name, found in report.matrices.items():
        left, right = tensors[name + LORA_B].astype(float), tensors[name + LORA_A].astype(float)
        assert left.shape[1] == right.shape[0] == found.rank <= 5
        np.testing.assert_allclose(right @ right.T, np.eye(found.rank), atol=1e-6)
        gram = left.T @ left
        np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-6 * max(gram[0, 0], 1e-30))
        assert (np.diff(np.sqrt(np.diag(gram))) <= 1e-6 * np.sqrt(gram[0, 0])).all()
        assert (np.take_along_axis(right, np.abs(right).argmax(1)[:, None], 1) > 0).all()


def padded(array: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    found = np.zeros(shape)
    rows, columns = (min(pair) for pair in zip(array.shape, shape, strict=True))
    found[:rows, :columns] = array[:rows, :columns]
    return found


@examples
@given(federated_round=rounds())
def test_zero_pad_averages_padded_factors(federated_round):
    _, tensors = run(federated_round, method=Method.ZERO_PAD)
    check_factor_averages(federated_round, tensors)


@examples
@given(federated_round=rounds(equal_ranks=True))
def test_average_averages_factors(federated_round):
    _, tensors = run(federated_round, method=Method.AVERAGE)
    check_factor_averages(federated_round, tensors)


def check_factor_averages(federated_round, tensors):
    for name in federated_round.matrices:
        trained = federated_round.trained(name)
        if not trained:
            continue
        rank = max(len(node.factors[name][1]) for node, _ in trained)
        rows, columns = trained[0][0].factors[name][0].shape[0], trained[0][0].factors[name][1].shape[1]
        left, right = np.zeros((rows, rank)), np.zeros((rank, columns))
        for node, weight in trained:
            mine, theirs = node.factors[name]
            left += weight * federated_round.scale(len(theirs)) * padded(mine, left.shape)
            right += weight * padded(theirs, right.shape)
        np.testing.assert_allclose(
            tensors[name + LORA_B], left, rtol=1e-6, atol=1e-5 * np.abs(left).max() + 1e-12
        )
        np.testing.assert_allclose(tensors[name + LORA_A], right, rtol=1e-6, atol=1e-5 * np.abs(right).max())


@examples
@given(federated_round=rounds())
def test_heads_are_averaged_by_samples_over_those_that_sent_them(federated_round):
    _, tensors = run(federated_round)
    sent = [(node.head["classifier.weight"], node.samples) for node in federated_round.nodes if node.head]
    name = HEAD + "classifier.weight"
    if sent:
        mean = sum(n * head.astype(float) for head, n in sent) / sum(n for _, n in sent)
        np.testing.assert_allclose(tensors[name], mean, rtol=1e-5, atol=1e-6)
    elif federated_round.start is not None:
        assert np.array_equal(tensors[name], federated_round.start_head["classifier.weight"])
    else:
        assert name not in tensors


@pytest.mark.parametrize("method", [Method.ZERO_PAD, Method.AVERAGE])
@given(seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_the_error_of_averaged_factors_is_estimated(method, seed):
    random = np.random.default_rng(seed)
    ranks = (4, 4, 4) if method is Method.AVERAGE else (2, 4, 8)
    names = [f"layer.{index}" for index in range(24)]
    nodes = [
        Node(f"n{k}", k + 1, {m: random_factors(random, 40, 30, rank) for m in names})
        for k, rank in enumerate(ranks)
    ]
    start = {m: random_factors(random, 40, 30, 4) for m in names}
    federated_round = Round(nodes, start, {}, 8.0)
    report, tensors = run(federated_round, method=method)
    targets = {m: federated_round.target(m, method) for m in names}
    errors = {m: np.linalg.norm(product_of(tensors, m) - targets[m]) for m in names}
    total = np.sqrt(sum(e**2 for e in errors.values()) / sum(np.sum(t**2) for t in targets.values()))
    assert report.relative_error == pytest.approx(total, rel=0.2)
    for m in names:
        assert report.matrices[m].relative_error == pytest.approx(
            errors[m] / np.linalg.norm(targets[m]), rel=0.6
        )


@contextmanager
def folds(room: int, keep: int) -> Iterator[None]:
    """Fold after so few terms that small rounds do it too."""
    before = low_rank_sum.FOLD_ROOM, low_rank_sum.FOLD_KEEP
    low_rank_sum.FOLD_ROOM, low_rank_sum.FOLD_KEEP = room, keep
    try:
        yield
    finally:
        low_rank_sum.FOLD_ROOM, low_rank_sum.FOLD_KEEP = before


@pytest.mark.parametrize("method", SVD_METHODS)
@settings(max_examples=40, deadline=None)
@given(federated_round=rounds(largest=6, max_nodes=8))
def test_folding_many_nodes_changes_nothing(method, federated_round):
    unfolded, tensors = run(federated_round, method=method, max_global_rank=6)
    with folds(room=12, keep=12):
        folded, again = run(federated_round, method=method, max_global_rank=6)
    for name, found in unfolded.matrices.items():
        size = size_of(federated_round, name)
        np.testing.assert_allclose(
            product_of(again, name), product_of(tensors, name), atol=1e-6 * size + 1e-30
        )
        norm = np.linalg.norm(product_of(tensors, name))
        if norm > 1e-6 * size:
            # Folded errors are seen through the probes Ω: ‖XΩ‖ is within Ω's singular values of ‖X‖.
            spread, rounding = np.linalg.cond(probes(tensors[name + LORA_A].shape[1])), 2e-6 * size / norm
            error = folded.matrices[name].relative_error
            assert found.relative_error / spread - rounding <= error
            assert error <= found.relative_error * spread + rounding
    check_comparison(federated_round, method, folded)


@pytest.mark.parametrize("optimizer", ["none", "fedavgm"])
@given(seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_the_error_of_a_lossy_fold_is_estimated(optimizer, seed):
    random = np.random.default_rng(seed)
    names = [f"layer.{index}" for index in range(24)]
    nodes = [
        Node(f"n{k}", k + 1, {m: random_factors(random, 40, 30, rank) for m in names})
        for k, rank in enumerate((2, 4, 8, 2, 4, 8))
    ]
    federated_round = Round(nodes, {m: svd_form(random.standard_normal((40, 30)), 4) for m in names}, {}, 8.0)
    with folds(room=4, keep=1):
        report, tensors = run(federated_round, max_global_rank=3, server=ServerOptimizer(name=optimizer))
    targets = {m: federated_round.target(m, Method.EXACT) for m in names}
    errors = {m: np.linalg.norm(product_of(tensors, m) - targets[m]) for m in names}
    total = np.sqrt(sum(e**2 for e in errors.values()) / sum(np.sum(t**2) for t in targets.values()))
    assert report.relative_error == pytest.approx(total, rel=0.1)
    for m in names:
        assert report.matrices[m].relative_error == pytest.approx(
            errors[m] / np.linalg.norm(targets[m]), rel=0.5
        )


def random_factors(random, rows, columns, rank):
    return np.float32(random.standard_normal((rows, rank))), np.float32(
        random.standard_normal((rank, columns))
    )


@pytest.mark.parametrize("method", list(Method))
@examples
@given(federated_round=rounds(equal_ranks=True))
def test_norms_and_cosines_equal_dense_ones(method, federated_round):
    report, _ = run(federated_round, method=method, max_global_rank=64)
    check_comparison(federated_round, method, report)


def check_comparison(federated_round, method, report):
    changes = {node.name: change_vectors(federated_round, node, method) for node in federated_round.nodes}
    for node in federated_round.nodes:
        mine = changes[node.name]
        size = sum(np.linalg.norm(x) for x in parts_of(federated_round, node)) + 1e-30
        norm = np.sqrt(sum(np.sum(x**2) for x in mine.values()))
        assert report.nodes[node.name].norm == pytest.approx(norm, rel=1e-6, abs=1e-6 * size)
        cosines = []
        for other in federated_round.nodes:
            theirs = changes[other.name]
            both = [name for name in mine if name in theirs and other is not node]
            a, b = (np.concatenate([one[name].ravel() for name in both] or [[]]) for one in (mine, theirs))
            if (lengths := np.linalg.norm(a) * np.linalg.norm(b)) > 0:
                cosines.append(a @ b / lengths)
        if all(np.linalg.norm(x) > 1e-5 * size or not x.any() for x in mine.values()):
            found = report.nodes[node.name].cosine
            assert (found is None) == (not cosines)
            assert found is None or found == pytest.approx(np.median(cosines), abs=1e-3)


def parts_of(federated_round, node):
    for name in node.factors:
        yield federated_round.product(node, name)
        yield np.asarray(federated_round.dense_start(name))


def change_vectors(federated_round, node, method):
    """Return what the norm of an update is taken of: D_k, or the factors' change where they are averaged."""
    found = {}
    start = federated_round.start
    for name, (left, right) in node.factors.items():
        if method in SVD_METHODS:
            found[name] = federated_round.change(node, name, method)
            continue
        before = start[name] if start else (np.zeros_like(left), None)
        found[name + LORA_B] = federated_round.scale(len(right)) * left.astype(float) - before[0]
        if start:
            found[name + LORA_A] = right.astype(float) - before[1]
    if start is not None:
        found |= {
            key: value - federated_round.start_head[key].astype(float) for key, value in node.head.items()
        }
    return found


@pytest.mark.parametrize("optimizer", ["none", "fedavgm", "fedadam"])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), rate=st.sampled_from([None, 0.5]))
def test_server_optimizers_equal_dense_ones_over_three_rounds(optimizer, seed, rate):
    random = np.random.default_rng(seed)
    name, rows, columns = MATRICES[0], 9, 7
    server = ServerOptimizer(name=optimizer, learning_rate=rate)
    aggregation = Aggregation(server=server, max_global_rank=7, checks=NO_CHECKS, robust=MEAN)
    eta = rate if rate is not None else (1e-3 if optimizer == "fedadam" else 1.0)
    dense, momentum, second = np.zeros((rows, columns)), np.zeros((rows, columns)), 0.0
    head, head_momentum, head_second = None, np.zeros(4), np.zeros(4)
    with tempfile.TemporaryDirectory() as folder:
        start, start_head, options = None, {}, {}
        for number in range(3):
            nodes = [
                Node(
                    f"n{k}",
                    k + 1,
                    {
                        name: (
                            np.float32(random.standard_normal((rows, 2))),
                            np.float32(random.standard_normal((2, columns))),
                        )
                    },
                    {"bias": np.float32(random.standard_normal(4))},
                )
                for k in range(3)
            ]
            federated_round = Round(nodes, start, start_head, 2.0)
            change = federated_round.target(name, Method.EXACT) - federated_round.dense_start(name)
            mean_head = sum((k + 1) * node.head["bias"].astype(float) for k, node in enumerate(nodes)) / 6
            keep, new = {"none": (0, 1), "fedavgm": (0.9, 1), "fedadam": (0.9, 0.1)}[optimizer]
            momentum = keep * momentum + new * change
            step = eta
            if optimizer == "fedadam":
                second = 0.99 * second + 0.01 * np.mean(change**2)
                step = adam_step(eta, second, number + 1)
            dense = federated_round.dense_start(name) + step * momentum
            if head is None:
                head = mean_head
            else:
                difference = mean_head - start_head["bias"]
                head_momentum = keep * head_momentum + new * difference
                head_second = 0.99 * head_second + 0.01 * difference**2
                step = adam_step(eta, head_second, number) if optimizer == "fedadam" else eta
                head = start_head["bias"] + step * head_momentum
            directory = Path(folder) / str(number)
            directory.mkdir()
            report, tensors = federated_round.run(directory, aggregation, **options)
            np.testing.assert_allclose(product_of(tensors, name), dense, atol=2e-6 * np.abs(dense).max())
            np.testing.assert_allclose(tensors[HEAD + "bias"], head, rtol=1e-4, atol=1e-5)
            start = {name: (tensors[name + LORA_B], tensors[name + LORA_A])}
            start_head = {"bias": tensors[HEAD + "bias"]}
            options = {"server_state": report.server_state.path} if report.server_state else {}
            assert (report.server_state is None) == (optimizer == "none")


def adam_step(eta, second, steps):
    return eta / (1 - 0.9**steps) / (np.sqrt(second / (1 - 0.99**steps)) + 1e-3)


def test_rank_does_not_collapse_where_truncation_does():
    """Ranks 2, 2, 4, 4, 8, 16: under `exact` what the strong nodes learned stays in G."""
    random = np.random.default_rng(0)
    rows, columns, name = 48, 32, "layer"
    goal = (
        np.linalg.qr(random.standard_normal((rows, 16)))[0]
        @ np.linalg.qr(random.standard_normal((columns, 16)))[0].T
    )
    ranks = {}
    for method in (Method.EXACT, Method.TRUNCATE):
        dense, start = np.zeros((rows, columns)), None
        for _ in range(15):
            nodes = []
            for k, rank in enumerate((2, 2, 4, 4, 8, 16)):
                base = dense - svd_part(dense, rank) if method is Method.EXACT else 0
                trained = svd_part(svd_part(dense, rank) + 0.3 * (goal - base - svd_part(dense, rank)), rank)
                left, right = svd_form(trained, rank)
                nodes.append(Node(f"n{k}", 1, {name: (left / (16 / rank), right)}))
            report, tensors = run(Round(nodes, start, {}, 16.0), method=method, max_global_rank=32)
            dense = product_of(tensors, name)
            start = {name: (tensors[name + LORA_B], tensors[name + LORA_A])}
        ranks[method] = report.effective_rank
    assert ranks[Method.EXACT] > 12
    assert ranks[Method.EXACT] > 1.3 * ranks[Method.TRUNCATE]


def svd_part(dense: np.ndarray, rank: int) -> np.ndarray:
    left, right = svd_form(dense, rank)
    return left.astype(float) @ right.astype(float)
