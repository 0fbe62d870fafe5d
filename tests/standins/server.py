# SPDX-License-Identifier: Apache-2.0
"""A coordinator process of one job without agents: `python server.py DIRECTORY PORT NODES COUNT [SPEC]`.

SPEC is JSON that replaces parts of the job's spec.

Every node's token is `token-NODE`. Exits 0 when the job has succeeded; prints the adapter's digest then.
"""

import asyncio
import json
import sys
import time
from pathlib import Path

from fedpipe_api.job import FedPipeJob
from fedpipe_operator.coordinator import Identity, application
from fedpipe_operator.engine import Engine
from fedpipe_operator.serving import listen, serve

UID = "job-1"


def job(nodes: int, count: int, method: str = "exact", **spec: object) -> FedPipeJob:
    """A job over tiny matrices; every node's update is needed."""
    return FedPipeJob.model_validate(
        {
            "metadata": {"name": "test", "uid": UID, "generation": 1},
            "spec": {
                "model": {
                    "hostPath": {"path": "/model"},
                    "task": "sequence-classification",
                    "labels": ["a", "b", "c"],
                },
                "data": {"volume": {"hostPath": {"path": "/data"}}, "train": "train.jsonl"},
                "nodes": {"min": nodes},
                "rounds": {"count": count, "localSteps": 2, "minUpdates": nodes, "deadline": "5m"},
                "adapter": {"ranks": {"min": 2, "max": 4}},
                "aggregation": {"method": method},
            }
            | spec,
        }
    )


async def identify(token: str) -> Identity | None:
    """Every token names its node."""
    return Identity(UID, token.removeprefix("token-")) if token.startswith("token-") else None


def _waited_for_a_core() -> float:
    """Seconds that this thread was ready to run while others had the cores (Linux, schedstat)."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


async def watch_lag(out: Path) -> None:
    """Keep the longest time the event loop was blocked in a file, in milliseconds: [in all, but for cores].

    The clients share the machine; what counts is the time that is not their taking of a core.
    """
    longest = [0.0, 0.0]
    while True:
        begin, waited = time.perf_counter(), _waited_for_a_core()
        await asyncio.sleep(0.005)
        lag = time.perf_counter() - begin - 0.005
        found = [lag, max(0, lag - (_waited_for_a_core() - waited))]
        if any(new > old for new, old in zip(found, longest, strict=True)):
            longest = [max(pair) for pair in zip(found, longest, strict=True)]
            out.write_text(json.dumps([1000 * value for value in longest]))


async def main(directory: Path, port: int, nodes: int, count: int, spec: dict[str, object]) -> int:
    """Serve until the job is done."""
    engine = Engine(directory)
    await engine.start()
    site = await serve(application(engine, identify), listen("127.0.0.1", port), shutdown_timeout=1)
    await engine.submit(job(nodes, count, **spec))
    await engine.set_eligible_nodes(UID, [f"node-{i}" for i in range(nodes)])
    lag = asyncio.create_task(watch_lag(directory / "lag"))
    while not engine.jobs[UID].state.finished:
        await engine.moved(UID, 1)
    lag.cancel()
    state = engine.jobs[UID].state
    await asyncio.sleep(0.3)  # the agents hear of it
    await site.close()
    await engine.stop()
    assert state.finished
    print(state.finished.phase, state.adapter.digest if state.adapter else state.finished.message, flush=True)
    return 0 if state.finished.phase == "Succeeded" else 1


def program() -> int:
    """Be a process of its own."""
    _, directory, port, nodes, count, *rest = sys.argv
    spec = json.loads(rest[0]) if rest else {}
    return asyncio.run(main(Path(directory), int(port), int(nodes), int(count), spec))


if __name__ == "__main__":
    sys.exit(program())
