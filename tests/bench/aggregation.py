# SPDX-License-Identifier: Apache-2.0
"""Aggregation of unequal adapters in factor space: seconds, memory, growth, and what becomes of the rank.

`python tests/bench/aggregation.py [--nodes 16] [--ranks 8..64] [--matrices 128] [--dim 4096] [--seed 0]`
`python tests/bench/aggregation.py --momentum 4 [--matrices 4]`: so many pairs of rounds without and with the server's
momentum instead, to results/aggregation-momentum.json

Beside it dense-SVD redistribution: form Σ w s B A as a dense matrix and decompose it, on one matrix; its
total is that times the matrices. Every run is a process of its own; memory is its peak above its imports.
Then 30 rounds of a small problem under `exact` and `truncate`: what rank does the global adapter keep?
Writes results/aggregation.json and results/aggregation.png beside this file.
"""

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from bench_machine import commit, machine
from safetensors.numpy import load_file, save_file

from fedpipe_api.job import Aggregation, Method, ServerOptimizer
from fedpipe_api.lora.codec import received
from fedpipe_api.lora.format import LORA_A, LORA_B, scale
from fedpipe_operator.aggregate import AggregationReport, AggregationRequest, NodeUpdate, aggregate_round

RESULTS = Path(__file__).parent / "results"
ALPHA, GLOBAL_RANK = 16.0, 32
DRIFT_RANKS, DRIFT_ROUNDS = (2, 2, 4, 4, 8, 16), 30

MEASURE = """
import json, pickle, re, sys, time
import numpy as np
from fedpipe_operator.aggregate import aggregate_round
from fedpipe_operator.aggregate.files import TensorFile
from fedpipe_operator.engine.worker import warm
warm()
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
def dense(request):
    total = sum(update.samples for update in request.updates)
    whole = 0.0
    for update in request.updates:
        file, rank = TensorFile(update.path), update.ranks["layer.0"]
        weight = update.samples / total * scale(request.alpha, rank, request.rs_lora)
        left, right = (file.read("layer.0" + suffix).astype(float) for suffix in (LORA_B, LORA_A))
        whole += weight * left @ right
    left, sigma, right = np.linalg.svd(whole, full_matrices=False)
    return [(left[:, :rank] * sigma[:rank], right[:rank]) for rank in (8, 16, 32, 64)]
with open(sys.argv[2], "rb") as file:
    request = pickle.load(file)
before, started, cpu = peak(), time.perf_counter(), time.process_time()
report = (dense if sys.argv[1] == "dense" else aggregate_round)(request)
figures = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
figures["peak_mb"] = (peak() - before) / 1e6
if sys.argv[1] != "dense":
    figures |= {"relative_error": report.relative_error, "effective_rank": report.effective_rank}
    figures["state_bytes"] = report.server_state.size if report.server_state else 0
    for file in (report.adapter, report.sent, report.server_state):
        if file is not None:
            file.path.unlink()
print(json.dumps(figures))
"""


def request_of(directory: Path, ranks: list[int], matrices: int, dim: int, seed: int) -> AggregationRequest:
    """Write a global adapter of rank 32 and one update a rank, and return the round's request."""
    random = np.random.default_rng(seed)

    def write(name: str, rank: int) -> Path:
        tensors = {}
        for index in range(matrices):
            tensors[f"layer.{index}{LORA_B}"] = random.standard_normal((dim, rank), dtype=np.float32)
            tensors[f"layer.{index}{LORA_A}"] = random.standard_normal((rank, dim), dtype=np.float32)
        save_file(tensors, directory / name)
        return directory / name

    names = [f"layer.{index}" for index in range(matrices)]
    updates = tuple(
        NodeUpdate(f"node-{k:03}", write(f"node-{k:03}", rank), 100 + k, dict.fromkeys(names, rank))
        for k, rank in enumerate(ranks)
    )
    adapter = write("global", GLOBAL_RANK)
    return AggregationRequest(Aggregation(), ALPHA, False, updates, directory, adapter)


def measured(request: AggregationRequest, kind: str = "factors") -> dict[str, float]:
    """Return what one run in a fresh process takes."""
    asked = request.directory / "request"
    asked.write_bytes(pickle.dumps(request))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, kind, asked], check=True, capture_output=True, text=True
    )
    found = json.loads(done.stdout)
    print("   ", {key: float(f"{value:.4g}") for key, value in found.items()}, flush=True)
    return found


def case(ranks: list[int], matrices: int, dim: int, seed: int, dense: bool = False) -> dict[str, object]:
    """Measure one round, and its dense counterpart."""
    text = ", ".join(map(str, sorted(set(ranks))))
    print(f"{len(ranks)} nodes, rank {text}, {matrices} matrices of {dim}×{dim}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        request = request_of(Path(folder), ranks, matrices, dim, seed)
        factors = measured(request)
        found: dict[str, object] = {"ranks": ranks, "matrices": matrices, "dim": dim, "factors": factors}
        if dense:
            found["dense_one_matrix"] = measured(request, "dense")
    return found


def momentum_pairs(ranks: list[int], matrices: int, dim: int, seed: int, count: int) -> list[dict]:
    """Measure a round without and with the server's momentum, one after the other, `count` times."""
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        plain = request_of(Path(folder), ranks, matrices, dim, seed)
        server = ServerOptimizer(name="fedavgm", momentum=0.5)
        first = replace(plain, aggregation=Aggregation(server=server))
        state = aggregate_round(first).server_state
        assert state is not None
        later = replace(first, server_state=state.path)
        for number in range(count):
            print(f"pair {number + 1}: without, with momentum", flush=True)
            pairs.append({"plain": measured(plain), "momentum": measured(later)})
    return pairs


# A problem whose best increment has rank 24, and each node its own drift from it.


def drift(method: Method, seed: int) -> dict[str, list[float]]:
    """Train 30 rounds and return the effective rank and the distance to the goal after each."""
    random = np.random.default_rng(seed)
    rows, columns = 96, 64
    basis = [np.linalg.qr(random.standard_normal((n, 24)))[0] for n in (rows, columns)]
    goal = basis[0] * np.linspace(1, 0.3, 24) @ basis[1].T
    goals = [goal + 0.02 * random.standard_normal(goal.shape) for _ in DRIFT_RANKS]
    found: dict[str, list[float]] = {"effective_rank": [], "distance": []}
    adapter = None
    with tempfile.TemporaryDirectory() as folder:
        for number in range(DRIFT_ROUNDS):
            updates = []
            for k, rank in enumerate(DRIFT_RANKS):
                left, right, frozen = start(adapter, rank, rows, columns, method, random)
                trained = train(left, right, frozen - goals[k], scale(ALPHA, rank, False))
                path = Path(folder) / f"{number}-{k}"
                save_file({"m" + LORA_B: trained[0], "m" + LORA_A: trained[1]}, path)
                updates.append(NodeUpdate(f"node-{k}", path, 100, {"m": rank}))
            aggregation = Aggregation(method=method)
            request = AggregationRequest(aggregation, ALPHA, False, tuple(updates), Path(folder), adapter)
            report: AggregationReport = aggregate_round(request)
            adapter = report.adapter.path
            tensors = load_file(adapter)
            found["effective_rank"].append(report.effective_rank)
            distance = np.linalg.norm(tensors["m" + LORA_B] @ tensors["m" + LORA_A] - goal)
            found["distance"].append(float(distance / np.linalg.norm(goal)))
    return found


def start(adapter, rank, rows, columns, method, random):
    """Return a node's factors, the best part of G as sent filled up with fresh rows, and what stays frozen."""
    norm, s = 1 / np.sqrt(3), scale(ALPHA, rank, False)
    right = random.standard_normal((rank, columns))
    right *= norm / np.linalg.norm(right, axis=1, keepdims=True)
    left, frozen = np.zeros((rows, rank)), np.zeros((rows, columns))
    if adapter is not None:
        tensors = load_file(adapter)
        factors = {suffix: tensors["m" + suffix] for suffix in (LORA_B, LORA_A)}
        found = received(factors) if method is Method.EXACT else factors
        whole = [found[suffix].astype(float) for suffix in (LORA_B, LORA_A)]
        held = min(rank, len(whole[1]))
        left[:, :held] = whole[0][:, :held] / (norm * s)
        right[:held] = norm * whole[1][:held]
        if method is Method.EXACT:
            frozen = whole[0][:, held:] @ whole[1][held:]
    return left, right, frozen


def train(left, right, offset, s, steps: int = 10, rate: float = 4e-3):
    """Return the factors after Adam steps on ½‖offset + s·left·right‖²."""
    values = [left, right]
    means, squares = ([np.zeros_like(value) for value in values] for _ in range(2))
    for step in range(1, steps + 1):
        error = offset + s * values[0] @ values[1]
        for side, gradient in enumerate((s * error @ values[1].T, s * values[0].T @ error)):
            means[side] = 0.9 * means[side] + 0.1 * gradient
            squares[side] = 0.999 * squares[side] + 0.001 * gradient**2
            root = np.sqrt(squares[side] / (1 - 0.999**step)) + 1e-8
            values[side] = values[side] - rate * means[side] / (1 - 0.9**step) / root
    return [np.float32(value) for value in values]


def plot(results: dict, path: Path) -> None:
    """Draw cost by nodes, cost by rank, and the effective rank by round."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (cost, memory, drifts) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for key, label in (("by_nodes", "4 to 64 nodes of rank 32"), ("by_rank", "16 nodes of rank 4 to 64")):
        total = [sum(c["ranks"]) for c in results[key]]
        cost.plot(
            total,
            [1e3 * c["factors"]["cpu_seconds"] / c["matrices"] for c in results[key]],
            "o-",
            label=label,
        )
        memory.plot(total, [c["factors"]["peak_mb"] for c in results[key]], "o-", label=label)
    dim = results["main"]["dim"]
    ticks = [64, 128, 256, 512, 1024, 2048]
    for axes in (cost, memory):
        axes.set(xlabel="sum of the nodes' ranks", xscale="log")
        axes.set_xticks(ticks, labels=map(str, ticks))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    cost.set(ylabel="CPU ms a matrix", yscale="log", title=f"Cost, {dim}×{dim}")
    cost.set_yticks([50, 100, 200, 500, 1000, 2000], labels=["50", "100", "200", "500", "1000", "2000"])
    memory.set(
        ylabel="MB above the imports", ylim=(0, None), title=f"Peak memory, {results['threads']} threads"
    )
    for method, found in results["drift"]["methods"].items():
        drifts.plot(range(1, DRIFT_ROUNDS + 1), found["effective_rank"], label=method)
    drifts.set(xlabel="round", ylabel="effective rank of G", ylim=(0, None), title="Ranks 2, 2, 4, 4, 8, 16")
    drifts.legend(frameon=False)
    drifts.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--ranks", default="8..64", help="powers of two between, dealt out in turn")
    parser.add_argument("--matrices", type=int, default=128)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--momentum", type=int, metavar="PAIRS", help="measure the server's momentum instead")
    chosen = parser.parse_args()
    low, high = map(int, chosen.ranks.split(".."))
    ladder = [2**power for power in range(12) if low <= 2**power <= high]
    ranks = [ladder[k % len(ladder)] for k in range(chosen.nodes)]
    started = time.perf_counter()
    dim, seed = chosen.dim, chosen.seed
    if chosen.momentum:
        about = {
            "machine": machine(),
            "commit": commit(),
            "load_before": os.getloadavg()[0],
            "ranks": ranks,
            "dim": dim,
            "seed": seed,
        }
        pairs = momentum_pairs(ranks, chosen.matrices, dim, seed, chosen.momentum)
        text = json.dumps(about | {"matrices": chosen.matrices, "pairs": pairs}, indent=1)
        (RESULTS / "aggregation-momentum.json").write_text(text + "\n")
        return
    results = {
        "machine": machine(),
        "load_before": os.getloadavg()[0],
        "seed": seed,
        "threads": min(4, len(os.sched_getaffinity(0))),
        "main": case(ranks, chosen.matrices, dim, seed, dense=True),
        "by_nodes": [case([32] * count, 4, dim, seed) for count in (4, 8, 16, 32, 64)],
        "by_rank": [case([rank] * 16, 4, dim, seed) for rank in (4, 8, 16, 32, 64)],
        "drift": {
            "ranks": DRIFT_RANKS,
            "methods": {m.value: drift(m, seed) for m in (Method.EXACT, Method.TRUNCATE)},
        },
    }
    results["seconds"] = time.perf_counter() - started
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "aggregation.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(results, RESULTS / "aggregation.png")
    for method, found in results["drift"]["methods"].items():
        rank = found["effective_rank"]
        print(f"{method}: effective rank {rank[4]:.1f} at round 5, {rank[-1]:.1f} at round {DRIFT_ROUNDS}")


if __name__ == "__main__":
    main()
