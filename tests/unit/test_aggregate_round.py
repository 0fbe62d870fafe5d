# SPDX-License-Identifier: Apache-2.0
"""A round from files to files: checks, bytes, memory, mistakes."""

import hashlib
import json
import multiprocessing
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedpipe_api.base import UserError
from fedpipe_api.job import Aggregation, Checks, Method, Robust, ServerOptimizer
from fedpipe_api.lora.format import HEAD, LORA_A, LORA_B, SCALE
from fedpipe_operator.aggregate import AggregationRequest, NodeUpdate, aggregate_round, factor_averaging
from fedpipe_operator.aggregate.files import MalformedFileError
from property.aggregate_reference import Node, Round, product_of, svd_form

M = "encoder.layer.0.attention.self.query"
FLAG, REJECT = Checks(mode="flag"), Checks(mode="reject")
MEAN = Robust(rule="none")


def honest(count: int, seed: int = 0, rank: int = 4, rows: int = 20, columns: int = 12) -> list[Node]:
    """Return updates that share a direction, each with some noise of its own."""
    random = np.random.default_rng(seed)
    common = random.standard_normal((rows, rank)), random.standard_normal((rank, columns))
    nodes = []
    for index in range(count):
        left, right = (np.float32(part + 0.3 * random.standard_normal(part.shape)) for part in common)
        nodes.append(Node(f"edge-{index}", 100 + index, {M: (left, right)}))
    return nodes


def poisoned(nodes: list[Node], index: int, factor: float) -> list[Node]:
    left, right = nodes[index].factors[M]
    nodes[index].factors[M] = (np.float32(factor * left), right)
    return nodes


def verdicts(report) -> dict[str, str]:
    return {node: found.verdict for node, found in report.nodes.items() if found.verdict != "ok"}


@pytest.mark.parametrize(
    "method", [Method.EXACT, Method.STACK, Method.TRUNCATE, Method.AVERAGE, Method.ZERO_PAD]
)
def test_honest_updates_pass(tmp_path, method):
    report, _ = Round(honest(5)).run(tmp_path, Aggregation(method=method, checks=REJECT))
    assert not verdicts(report)
    assert all(found.cosine > 0.5 for found in report.nodes.values())
    assert all(found.reason == "" for found in report.nodes.values())


@pytest.mark.parametrize(
    "method", [Method.EXACT, Method.STACK, Method.TRUNCATE, Method.AVERAGE, Method.ZERO_PAD]
)
def test_a_giant_update_is_rejected_and_the_rest_is_as_without_it(tmp_path, method):
    nodes = poisoned(honest(5), 2, -1000)
    report, tensors = Round(nodes).run(tmp_path, Aggregation(method=method, checks=REJECT))
    assert verdicts(report) == {"edge-2": "rejected"}
    assert "norm" in report.nodes["edge-2"].reason
    assert report.nodes["edge-2"].norm > 100 * report.nodes["edge-1"].norm
    (tmp_path / "without").mkdir()
    without, clean = Round(nodes[:2] + nodes[3:]).run(
        tmp_path / "without", Aggregation(method=method, checks=REJECT)
    )
    assert without.adapter.digest == report.adapter.digest
    assert np.array_equal(tensors[M + LORA_A], clean[M + LORA_A])
    for name, found in without.nodes.items():
        assert report.nodes[name].cosine == pytest.approx(found.cosine, rel=1e-9)


@pytest.mark.parametrize("method", [Method.EXACT, Method.AVERAGE])
def test_a_giant_update_is_clipped_to_the_limit_when_flagging(tmp_path, method):
    nodes = poisoned(honest(5), 2, 50)
    report, tensors = Round(nodes).run(tmp_path, Aggregation(method=method, checks=FLAG, robust=MEAN))
    assert verdicts(report) == {"edge-2": "clipped"}
    limit = 5 * np.median([found.norm for found in report.nodes.values()])
    shrunk = poisoned(nodes, 2, limit / report.nodes["edge-2"].norm)
    (tmp_path / "shrunk").mkdir()
    _, expected = Round(shrunk).run(
        tmp_path / "shrunk", Aggregation(method=method, checks=Checks(mode="none"), robust=MEAN)
    )
    np.testing.assert_allclose(product_of(tensors, M), product_of(expected, M), rtol=1e-4, atol=1e-5)


def test_clipping_is_of_the_change_not_of_the_product(tmp_path):
    nodes = honest(4)
    start = {M: svd_form(10 * Round(nodes).target(M, Method.EXACT), 4)}
    base = Round(nodes, start)
    left, right = svd_form(base.dense_received(M, 4) / base.scale(4), 4)
    for index, node in enumerate(nodes):
        step = np.random.default_rng(index).standard_normal(left.shape)
        node.factors[M] = (np.float32(left + (100 if index == 3 else 1) * 1e-3 * step), right)
    report, tensors = base.run(tmp_path, Aggregation(checks=FLAG, robust=MEAN))
    assert verdicts(report) == {"edge-3": "clipped"}
    limit = 5 * np.median([found.norm for found in report.nodes.values()])
    wanted = base.dense_start(M)
    for node, weight in base.trained(M):
        wanted = wanted + weight * min(1, limit / report.nodes[node.name].norm) * base.change(
            node, M, Method.EXACT
        )
    np.testing.assert_allclose(product_of(tensors, M), wanted, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.parametrize(("checks", "verdict"), [(FLAG, "flagged"), (REJECT, "rejected")])
def test_a_turned_update_is_found_by_its_cosine(tmp_path, checks, verdict):
    report, _ = Round(poisoned(honest(6), 4, -1)).run(tmp_path, Aggregation(checks=checks, robust=MEAN))
    assert verdicts(report) == {"edge-4": verdict}
    assert report.nodes["edge-4"].cosine < -0.5
    assert "cosine" in report.nodes["edge-4"].reason


def test_a_giant_turned_update_has_both_findings_and_the_honest_ones_none(tmp_path):
    report, _ = Round(poisoned(honest(6), 4, -100)).run(tmp_path, Aggregation(checks=FLAG, robust=MEAN))
    assert verdicts(report) == {"edge-4": "flagged"}
    assert "cosine" in report.nodes["edge-4"].reason
    assert "clipped" in report.nodes["edge-4"].reason


def test_two_that_disagree_are_not_distinguished(tmp_path):
    report, _ = Round(poisoned(honest(2), 1, -1)).run(tmp_path, Aggregation(checks=REJECT))
    assert not verdicts(report)
    assert report.nodes["edge-0"].cosine < -0.5


def test_without_checks_everything_finite_counts(tmp_path):
    aggregation = Aggregation(checks=Checks(mode="none"), robust=MEAN)
    report, _ = Round(poisoned(honest(4), 1, -100)).run(tmp_path, aggregation)
    assert not verdicts(report)


def test_the_running_median_sees_earlier_rounds(tmp_path):
    nodes = honest(2)
    now, _ = Round(nodes).run(tmp_path, Aggregation(checks=FLAG))
    norm = now.nodes["edge-0"].norm
    (tmp_path / "later").mkdir()
    later, _ = Round(nodes).run(tmp_path / "later", Aggregation(checks=FLAG), norms=(norm / 100,) * 10)
    assert verdicts(later) == {"edge-0": "clipped", "edge-1": "clipped"}


@pytest.mark.parametrize(
    "method", [Method.EXACT, Method.STACK, Method.TRUNCATE, Method.AVERAGE, Method.ZERO_PAD]
)
@pytest.mark.parametrize("mode", ["none", "flag"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_values_that_are_not_finite_never_count(tmp_path, method, mode, value, side):
    nodes = honest(4)
    nodes[1].factors[M][side][0, 0] = value
    aggregation = Aggregation(method=method, checks=Checks(mode=mode))
    report, tensors = Round(nodes).run(tmp_path, aggregation)
    assert verdicts(report) == {"edge-1": "rejected"}
    assert report.nodes["edge-1"].norm == 0
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())
    (tmp_path / "without").mkdir()
    without, _ = Round(nodes[:1] + nodes[2:]).run(tmp_path / "without", aggregation)
    assert without.adapter.digest == report.adapter.digest


def test_a_head_that_is_not_finite_never_counts(tmp_path):
    nodes = honest(3)
    for node in nodes:
        node.head = {"bias": np.ones(3, np.float32)}
    nodes[0].head["bias"][1] = np.inf
    report, tensors = Round(nodes).run(tmp_path, Aggregation())
    assert verdicts(report) == {"edge-0": "rejected"}
    assert np.array_equal(tensors[HEAD + "bias"], np.ones(3))


def test_what_outgrows_float32_is_reported_and_leaves_no_file(tmp_path):
    nodes = poisoned(honest(2), 0, 5e37)
    with pytest.raises(UserError, match=r"no longer fits float32.*checks\.mode"):
        Round(nodes).run(tmp_path, Aggregation(checks=Checks(mode="none")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["edge-0.safetensors", "edge-1.safetensors"]


def test_all_rejected_keeps_the_global_adapter(tmp_path):
    nodes = honest(2)
    for node in nodes:
        node.factors[M][0][:] = np.nan
    start = {M: svd_form(np.random.default_rng(0).standard_normal((20, 12)), 3)}
    report, tensors = Round(nodes, start, {"bias": np.ones(2, np.float32)}).run(tmp_path, Aggregation())
    assert set(verdicts(report).values()) == {"rejected"}
    assert np.array_equal(tensors[M + LORA_B], start[M][0])
    assert np.array_equal(tensors[HEAD + "bias"], np.ones(2))


def many_matrices(nodes: int = 6, matrices: int = 9, rows: int = 64, columns: int = 48) -> Round:
    random = np.random.default_rng(3)
    updates = [
        Node(
            f"edge-{k}",
            int(random.integers(10, 1000)),
            {
                f"layer.{m}.key": (
                    np.float32(random.standard_normal((rows, 2 + k))),
                    np.float32(random.standard_normal((2 + k, columns))),
                )
                for m in range(matrices)
                if random.random() < 0.8
            },
            {"classifier.weight": np.float32(random.standard_normal((4, columns)))},
        )
        for k in range(nodes)
    ]
    start = {f"layer.{m}.key": svd_form(random.standard_normal((rows, columns)), 8) for m in range(matrices)}
    return Round(updates, start, {"classifier.weight": np.zeros((4, columns), np.float32)})


@pytest.mark.parametrize("method", [Method.EXACT, Method.TRUNCATE, Method.STACK, Method.ZERO_PAD])
@pytest.mark.parametrize("optimizer", ["none", "fedadam"])
def test_the_same_updates_give_the_same_bytes(tmp_path, method, optimizer):
    """Whatever the order of the updates, the threads, the process and the alignment of its memory."""
    federated_round = many_matrices()
    aggregation = Aggregation(method=method, max_global_rank=12, server=ServerOptimizer(name=optimizer))
    reports = []
    for threads in (1, 3):
        directory = tmp_path / str(threads)
        directory.mkdir()
        reports.append(federated_round.run(directory, aggregation, threads=threads)[0])
        federated_round.nodes.reverse()
        padding = np.empty(1000 * threads + 7)
        assert padding.size
    assert {report.adapter.digest for report in reports} == {reports[0].adapter.digest}
    assert {report.server_state and report.server_state.digest for report in reports} == {
        reports[0].server_state and reports[0].server_state.digest
    }
    assert reports[0].matrices == reports[1].matrices
    assert reports[0].nodes == reports[1].nodes


def test_factors_too_large_to_be_held_in_memory_give_the_same_bytes(tmp_path, monkeypatch):
    federated_round = many_matrices()
    reports = []
    for limit in (factor_averaging.HELD_BYTES, 0):
        monkeypatch.setattr(factor_averaging, "HELD_BYTES", limit)
        directory = tmp_path / str(limit)
        directory.mkdir()
        reports.append(federated_round.run(directory, Aggregation(method=Method.ZERO_PAD))[0])
    assert reports[0].adapter.digest == reports[1].adapter.digest
    assert reports[0].matrices == reports[1].matrices
    assert reports[0].nodes == reports[1].nodes


@pytest.mark.parametrize("method", [Method.EXACT, Method.ZERO_PAD])
def test_a_worker_process_gives_the_same_bytes_a_round_later(tmp_path, method):
    """Also of what no node trained in that round: it is carried over with its optimizer state."""
    federated_round = many_matrices()
    aggregation = Aggregation(method=method, max_global_rank=12, server=ServerOptimizer(name="fedadam"))
    before, _ = federated_round.run(tmp_path, aggregation)
    for node in federated_round.nodes:
        node.factors.pop("layer.0.key", None)
        node.head = {}
    request = AggregationRequest(
        aggregation=aggregation,
        alpha=16.0,
        rs_lora=False,
        updates=tuple(node.write(tmp_path) for node in federated_round.nodes),
        directory=tmp_path,
        adapter=before.adapter.path,
        server_state=before.server_state.path,
    )
    report = aggregate_round(request)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        other = pool.submit(aggregate_round, request).result()
    assert other.adapter.digest == report.adapter.digest
    assert other.server_state.digest == report.server_state.digest
    files = {"adapter": report.adapter, "sent": report.sent, "server_state": report.server_state}
    assert (other.sent and other.sent.digest) == (report.sent and report.sent.digest)
    assert replace(other, **files) == report
    for old, new in ((before.adapter, report.adapter), (before.server_state, report.server_state)):
        was, now = load_file(old.path), load_file(new.path)
        kept = [name for name in was if name.startswith(("layer.0.key", HEAD))]
        assert kept
        assert all(np.array_equal(was[name], now[name]) for name in kept)
    assert "layer.0.key" not in report.matrices


def test_request_and_report_can_be_pickled(tmp_path):
    report, _ = many_matrices(2, 2).run(tmp_path, Aggregation())
    assert pickle.loads(pickle.dumps(report)) == report
    request = AggregationRequest(
        Aggregation(), 16.0, False, (NodeUpdate("n", tmp_path / "x", 1, {M: 2}),), tmp_path
    )
    assert pickle.loads(pickle.dumps(request)) == request


def test_the_file_is_plain_safetensors_and_its_digest_is_right(tmp_path):
    report, tensors = many_matrices().run(tmp_path, Aggregation(server=ServerOptimizer(name="fedavgm")))
    for stored in (report.adapter, report.server_state):
        body = stored.path.read_bytes()
        assert len(body) == stored.size
        assert hashlib.sha256(body).hexdigest() == stored.digest
        header = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
        assert all(entry["dtype"] == "F32" for entry in header.values())
        assert load_file(stored.path).keys() == header.keys()
    assert tensors
    assert stored.path.parent == tmp_path


def test_what_is_sent_has_a_quarter_of_the_bytes_and_half_a_step_of_error(tmp_path):
    report, tensors = many_matrices().run(tmp_path, Aggregation())
    sent = load_file(report.sent.path)
    factors = [name for name in tensors if not name.startswith(HEAD)]
    assert sent.keys() == tensors.keys() | {name + SCALE for name in factors}
    for name in factors:
        assert sent[name].dtype == np.int8
        steps = np.expand_dims(sent[name + SCALE], 0 if name.endswith(LORA_B) else 1)
        assert (np.abs(sent[name] * steps - tensors[name]) <= 0.5001 * steps).all()
    down = sum(sent[key].nbytes for name in factors for key in (name, name + SCALE))
    assert sum(tensors[name].nbytes for name in factors) > 3.5 * down
    assert np.array_equal(sent[HEAD + "classifier.weight"], tensors[HEAD + "classifier.weight"])


@pytest.mark.parametrize("method", [Method.ZERO_PAD, Method.TRUNCATE, Method.STACK])
def test_methods_of_other_papers_send_float32(tmp_path, method):
    report, _ = many_matrices().run(tmp_path, Aggregation(method=method))
    assert report.sent is None


def test_no_file_is_left_beside_those_of_the_report(tmp_path):
    before = {f"edge-{k}.safetensors" for k in range(5)}
    report, _ = Round(poisoned(honest(5), 0, -1000)).run(tmp_path, Aggregation(checks=REJECT))
    files = {report.adapter.path.name, report.sent.path.name}
    assert {path.name for path in tmp_path.iterdir()} == before | files


def test_average_of_unequal_ranks_is_a_users_mistake(tmp_path):
    nodes = [*honest(2, rank=4), *honest(1, rank=2)]
    nodes[2].name = "edge-x"
    with pytest.raises(UserError, match=r"average needs equal ranks, but .*query has ranks 2 to 4"):
        Round(nodes).run(tmp_path, Aggregation(method=Method.AVERAGE))
    assert not list(tmp_path.glob("adapter-*"))


def test_an_update_with_other_shapes_is_refused(tmp_path):
    nodes = [*honest(2), *honest(1, columns=13)]
    nodes[2].name = "edge-x"
    with pytest.raises(MalformedFileError, match=r"the update of edge-x: matrix .*query has factors"):
        Round(nodes).run(tmp_path, Aggregation())
    assert not list(tmp_path.glob("adapter-*"))


def test_a_node_that_trained_nothing_takes_no_part(tmp_path):
    nodes = [*honest(3), Node("idle", 10_000, {}, {})]
    report, tensors = Round(nodes).run(tmp_path, Aggregation())
    np.testing.assert_allclose(
        product_of(tensors, M), Round(nodes[:3]).target(M, Method.EXACT), rtol=1e-4, atol=1e-5
    )
    assert report.nodes["idle"].norm == 0
    assert report.nodes["idle"].cosine is None


def peak_of_a_round(directory, nodes: int, matrices: int) -> int:
    """Return the peak memory in bytes of a fresh process that aggregates so many updates."""
    update = directory / f"update-{matrices}"
    side, rank = 2048, 16
    if not update.exists():
        ones = {f"layer.{m}": np.random.default_rng(m).standard_normal((side, rank)) for m in range(matrices)}
        tensors = {name + LORA_B: np.float32(value) for name, value in ones.items()}
        tensors |= {name + LORA_A: np.ascontiguousarray(np.float32(value).T) for name, value in ones.items()}
        save_file(tensors, update)
    ranks = {f"layer.{m}": rank for m in range(matrices)}
    request = AggregationRequest(
        aggregation=Aggregation(method=Method.AVERAGE),
        alpha=16.0,
        rs_lora=False,
        updates=tuple(NodeUpdate(f"n{k:03}", update, 10, ranks) for k in range(nodes)),
        directory=directory,
        threads=2,
    )
    asked = directory / "request"
    asked.write_bytes(pickle.dumps(request))
    done = subprocess.run([sys.executable, "-c", MEASURED, asked], check=True, capture_output=True)
    return int(done.stdout)


MEASURED = r"""
import pickle, re, sys
from fedpipe_operator.aggregate import aggregate_round
from fedpipe_operator.engine.worker import warm
warm()
with open(sys.argv[1], "rb") as file:
    aggregate_round(pickle.load(file))
print(1024 * int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]))
"""


def test_memory_grows_neither_with_nodes_nor_with_matrices(tmp_path):
    small = peak_of_a_round(tmp_path, nodes=2, matrices=4)
    assert peak_of_a_round(tmp_path, nodes=64, matrices=4) - small < 16e6
    assert peak_of_a_round(tmp_path, nodes=2, matrices=96) - small < 16e6
