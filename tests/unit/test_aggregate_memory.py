# SPDX-License-Identifier: Apache-2.0
"""What an aggregation takes is known before it begins, and what does not fit is refused."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedpipe_api import host_memory
from fedpipe_api.base import UserError
from fedpipe_api.job import Aggregation, Method, ServerOptimizer
from fedpipe_api.lora.format import HEAD, LORA_A, LORA_B
from fedpipe_operator.aggregate import AggregationRequest, NodeUpdate
from fedpipe_operator.aggregate.memory import MatrixSize, peak_bytes
from fedpipe_operator.engine import aggregation as engine_aggregation
from fedpipe_operator.engine import room
from standins.local import local, working
from standins.server import UID

MIB = 2**20

MEASURED = r"""
import pickle, re, sys
from fedpipe_operator.aggregate import aggregate_round
from fedpipe_operator.engine.worker import warm
warm()
def peak():
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
with open(sys.argv[1], "rb") as file:
    request = pickle.load(file)
before = peak()
aggregate_round(request)
print(peak() - before)
"""


def measured(folder: Path, shape, ranks, matrices, threads, aggregation, head, start) -> int:
    """Return the peak of a fresh process above its imports."""
    random = np.random.default_rng(0)

    def write(name: str, rank: int) -> Path:
        tensors = {HEAD + "w": random.standard_normal(head, dtype=np.float32)} if head else {}
        for index in range(matrices):
            tensors[f"m{index}{LORA_B}"] = random.standard_normal((shape[0], rank), dtype=np.float32)
            tensors[f"m{index}{LORA_A}"] = random.standard_normal((rank, shape[1]), dtype=np.float32)
        save_file(tensors, folder / name)
        return folder / name

    files = {rank: write(f"rank-{rank}", rank) for rank in sorted(set(ranks))}
    updates = tuple(
        NodeUpdate(f"n{k:04}", files[rank], 10, {f"m{index}": rank for index in range(matrices)})
        for k, rank in enumerate(ranks)
    )
    adapter = write("global", start) if start else None
    request = AggregationRequest(aggregation, 16.0, False, updates, folder, adapter, threads=threads)
    (folder / "request").write_bytes(pickle.dumps(request))
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, folder / "request"], check=True, capture_output=True, text=True
    )
    return int(done.stdout)


EXACT = Aggregation()
ADAM = ServerOptimizer(name="fedadam")


@pytest.mark.parametrize(
    ("shape", "ranks", "matrices", "threads", "aggregation", "head", "start"),
    [
        ((4096, 4096), [8, 16, 32, 64] * 2, 4, 1, EXACT, 0, 32),
        ((4096, 4096), [8, 16, 32, 64] * 2, 4, 2, EXACT, 0, 32),
        ((20000, 512), [16] * 10, 3, 1, EXACT, 0, 32),
        ((512, 20000), [16] * 10, 3, 1, EXACT, 0, 32),
        ((4096, 4096), [32] * 40, 3, 1, EXACT, 0, 32),
        ((4096, 2048), [16] * 6, 4, 2, Aggregation(server=ADAM), 0, 32),
        ((4096, 4096), [16] * 10, 4, 2, Aggregation(method=Method.ZERO_PAD), 0, 16),
        ((8192, 4096), [16] * 10, 4, 2, Aggregation(method=Method.AVERAGE, server=ADAM), 0, 16),
        ((4096, 4096), [16] * 10, 4, 2, Aggregation(method=Method.TRUNCATE), 0, 32),
        ((256, 256), [4] * 20, 2, 1, EXACT, 4_000_000, 0),
        ((256, 256), [4] * 20, 2, 1, EXACT, 4_000_000, 4),
        ((1_000_000, 256), [4] * 2, 1, 1, EXACT, 0, 4),
        ((1_000_000, 256), [4] * 2, 1, 1, EXACT, 0, 0),
    ],
)
def test_the_prediction_is_never_below_and_within_a_quarter(
    tmp_path, shape, ranks, matrices, threads, aggregation, head, start
):
    taken = measured(tmp_path, shape, ranks, matrices, threads, aggregation, head, start)
    sizes = [MatrixSize(*shape, ranks, start)] * matrices
    predicted = peak_bytes(aggregation, sizes, [head] if head else [], len(ranks), threads)
    # How much of their work threads do at the same moment is the scheduler's choice.
    assert taken <= predicted <= 1.25 * taken + 16 * MIB * threads, (taken / MIB, predicted / MIB)


def test_a_matrix_of_10_000_000_rows_is_refused_under_the_limit_of_the_chart(monkeypatch, tmp_path):
    """Its upload of 76 MiB made the aggregation peak at 3.5 GiB."""
    sizes = [MatrixSize(10_000_000, 1, [2] * 4, 1)]
    limit = int(0.95 * 2 * 2**30) - 100 * MIB - room.WORKER
    assert peak_bytes(EXACT, sizes, [], 4, 1) > limit
    monkeypatch.setattr(room, "sizes", lambda request, state: (sizes, []))
    updates = (NodeUpdate("n", tmp_path, 1, {"m": 2}),) * 4
    request = AggregationRequest(EXACT, 16.0, False, updates, tmp_path)
    with pytest.raises(UserError, match=r"needs \d+ MiB .* has 1733 MiB .* memory limit, or lower spec\."):
        room.fitting(request, None, limit)


def test_threads_are_lowered_before_a_round_is_refused(monkeypatch, tmp_path):
    sizes = [MatrixSize(4096, 4096, [16] * 8, 32)] * 8
    monkeypatch.setattr(room, "sizes", lambda request, state: (sizes, []))
    monkeypatch.setattr(room.os, "sched_getaffinity", lambda pid: set(range(8)))
    request = AggregationRequest(EXACT, 16.0, False, (NodeUpdate("n", tmp_path, 1, {}),) * 8, tmp_path)
    needs = {threads: peak_bytes(EXACT, sizes, [], 8, threads) for threads in (1, 2, 3, 4)}
    assert room.fitting(request, None, needs[4]).threads == 4
    assert room.fitting(request, None, needs[4] - 1).threads == 3
    assert room.fitting(request, None, needs[1]).threads == 1
    with pytest.raises(UserError):
        room.fitting(request, None, needs[1] - 1)


@pytest.mark.parametrize(
    ("cgroup", "files", "limit"),
    [
        ("", {}, 8192),
        ("0::/\n", {"memory.max": "max\n"}, 8192),
        ("0::/\n", {"memory.max": f"{2048 * MIB}\n"}, 2048),
        ("0::/pods/a\n", {"pods/memory.max": f"{1024 * MIB}", "pods/a/memory.max": "max"}, 1024),
        ("0::/../other\n", {"memory.max": f"{512 * MIB}"}, 512),
        ("4:cpu,memory:/pod\n0::/\n", {"memory/memory.limit_in_bytes": f"{256 * MIB}"}, 256),
        ("4:memory:/pod\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, 8192),
    ],
)
def test_the_limit_is_that_of_the_control_groups_or_the_machine(tmp_path, cgroup, files, limit):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: {8192 * 1024} kB\nMemFree: 1 kB\n")
    (tmp_path / "proc/self/cgroup").write_text(cgroup)
    (tmp_path / "proc/self/status").write_text(f"Name: x\nVmRSS:\t{100 * 1024} kB\n")
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert host_memory.read(tmp_path).total == limit * MIB
    assert room.available(tmp_path) == int(0.95 * limit * MIB) - 100 * MIB - room.WORKER


async def test_a_job_whose_round_does_not_fit_fails_once_with_a_reason(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(engine_aggregation, "available", lambda: asked.append(1) or MIB)
    async with local(tmp_path, nodes=2, count=2) as served:
        async with working([served.agent(node) for node in served.nodes]):
            await served.finish()
        state = served.engine.jobs[UID].state
        assert state.finished.reason == "Invalid"
        assert "operator's memory limit" in state.finished.message
        assert state.adapter is None
    assert asked == [1]
