# SPDX-License-Identifier: Apache-2.0
"""Seconds a round costs without training: every client receives and returns the payload each round.

`python tests/bench/control_plane.py [--clients 4 8 16 64] [--megabytes 0.5 10 100] [--rounds 5] [--out FILE]`

Beside it, in the same run, the floor: a bare aiohttp file server, streamed to and from disk, plus one streamed
average; and the durable floor, which also makes each file durable (fsync) before it answers, as the engine must. Clients share one process and hash only what changes, so that the server is what is measured.
"""

import argparse
import asyncio
import hashlib
import json
import os
import socket
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, closing, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import aiohttp
import numpy as np
from bench_machine import machine
from safetensors.numpy import save

import standins.server
from fedpipe_api.lora.format import HEAD, LORA_A, LORA_B
from fedpipe_api.wire import (
    MANIFEST_HEADER,
    Assignment,
    ModelShape,
)
from standins.agents import StandIn, manifest_of, model_shape

MATRICES, RANK, CHUNK = 48, 8, 1 << 20


def shape_for(megabytes: float) -> ModelShape:
    """A model whose rank-8 adapter of 48 matrices (96 tensors) has about the given size."""
    side = max(1, round(megabytes * 1e6 / (MATRICES * 2 * RANK * 4)))
    return model_shape(MATRICES, side, side)


class Body:
    """An update of which every round changes only the last bytes."""

    def __init__(self, shape: ModelShape) -> None:
        random = np.random.default_rng(0)
        tensors = {}
        for matrix in shape.matrices:
            tensors[matrix.name + LORA_B] = random.standard_normal((matrix.rows, RANK), dtype=np.float32)
            tensors[matrix.name + LORA_A] = random.standard_normal((RANK, matrix.columns), dtype=np.float32)
        tensors |= {HEAD + t.name: np.zeros(t.shape, np.float32) for t in shape.head}
        whole = save(tensors)
        self.start, self.tail = whole[:-4], 4
        self.size = len(whole)
        self._hash = hashlib.sha256(self.start)

    def of(self, node: int, round_number: int) -> tuple[bytes, str]:
        """Return the last bytes and the digest of one node's update."""
        end = np.float32(node + round_number / 1000).tobytes()
        digest = self._hash.copy()
        digest.update(end)
        return end, digest.hexdigest()

    async def stream(self, end: bytes) -> AsyncIterator[bytes]:
        """Yield the update."""
        view = memoryview(self.start)
        for offset in range(0, len(view), CHUNK):
            yield bytes(view[offset : offset + CHUNK])
        yield end


class Client(StandIn):
    """A stand-in that returns `body` and reads the global adapter without keeping it."""

    body: Body
    number: int

    async def _download(self, digest: str) -> None:
        await drain(self._session, f"{self.address()}/v1/blobs/{digest}")

    async def _train(self, work: Assignment) -> None:
        assert work.plan
        end, digest = self.body.of(self.number, work.round)
        known = {"digest": digest, "size": self.body.size}
        headers = {
            MANIFEST_HEADER: manifest_of(b"-", work.plan, work.round, work.adapter)
            .model_copy(update=known)
            .to_json(),
            "Content-Length": str(self.body.size),
        }
        url = f"{self.address()}/v1/rounds/{work.round}/update"
        async with self._session.put(url, data=self.body.stream(end), headers=headers) as response:
            if response.status >= 400:
                sys.exit(f"{self.node}: {response.status} {await response.text()}")


async def drain(session: aiohttp.ClientSession, url: str) -> None:
    """Download and forget."""
    async with session.get(url) as response:
        response.raise_for_status()
        async for _ in response.content.iter_any():
            pass


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def wait_port(port: int) -> None:
    """Return when something listens."""
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return
        except OSError:
            await asyncio.sleep(0.05)


def peak_megabytes(pid: int) -> float:
    """Return the peak resident memory of a process and its children, added."""
    total = 0.0
    for child in (pid, *children(pid)):
        status = Path(f"/proc/{child}/status").read_text()
        total += int(next(li for li in status.splitlines() if li.startswith("VmHWM")).split()[1]) / 1e3
    return total


def children(pid: int) -> list[int]:
    """Return the processes below one."""
    direct = [
        int(p) for t in Path(f"/proc/{pid}/task").iterdir() for p in (t / "children").read_text().split()
    ]
    return [c for p in direct for c in (p, *children(p))]


async def engine_round(
    directory: Path, clients: int, body: Body, shape: ModelShape, rounds: int
) -> dict[str, float]:
    """Return the median seconds of a round of the real engine, and its memory."""
    port = free_port()
    spec = {
        "adapter": {"ranks": {"min": RANK, "max": RANK}, "selection": {"mode": "all"}},
        "data": {
            "volume": {"hostPath": {"path": "/data"}},
            "train": "train.jsonl",
            "evaluationShare": 0,
        },
        "aggregation": {"method": "average", "checks": {"mode": "none"}},
        # The planner thinks of training, which takes long on a CPU at such sizes; here nobody trains.
        "rounds": {"count": rounds, "localSteps": 1, "minUpdates": clients, "deadline": "240h"},
    }
    arguments = [str(directory), str(port), str(clients), str(rounds), json.dumps(spec)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    server = await asyncio.create_subprocess_exec(
        sys.executable, standins.server.__file__, *arguments, env=environment, stdout=asyncio.subprocess.PIPE
    )
    await wait_port(port)
    address = f"http://127.0.0.1:{port}"
    agents = []
    for number in range(clients):
        agent = Client(f"node-{number}", f"token-node-{number}", lambda: address, shape, free_memory=1 << 40)
        agent.body, agent.number = body, number
        agents.append(asyncio.create_task(agent.run()))
    memory = 0.0
    while server.returncode is None:
        with suppress(OSError, StopIteration):  # it is starting or gone
            memory = max(memory, peak_megabytes(server.pid))
        await asyncio.sleep(0.1)
    for task in agents:
        task.cancel()
    assert server.returncode == 0
    with closing(sqlite3.connect(directory / "ledger.sqlite")) as db:
        rows = dict(db.execute("SELECT key, at FROM record"))
    took = [rows[f"aggregated/{n}"] - rows[f"opened/{n}"] for n in range(2, rounds + 1)]
    lag, own = json.loads((directory / "lag").read_text())
    seconds = statistics.median(took)
    return {"seconds": seconds, "memory_mb": memory, "longest_lag_ms": lag, "longest_block_ms": own}


FLOOR = """
import asyncio, os, sys
import numpy as np
from aiohttp import web
directory, port, clients, size, durable = sys.argv[1], *map(int, sys.argv[2:])
state = {"round": 0, "got": 0}
turned = asyncio.Event()
open(f"{directory}/global", "wb").write(bytes(size))
def average():
    with open(f"{directory}/new", "wb") as out:
        files = [open(f"{directory}/{i}", "rb") for i in range(clients)]
        while True:
            parts = [np.frombuffer(f.read(1 << 20), np.float32) for f in files]
            if not parts[0].size:
                break
            out.write((sum(p.astype(np.float64) for p in parts) / clients).astype(np.float32).tobytes())
    os.replace(f"{directory}/new", f"{directory}/global")
async def get(request):
    while state["round"] < int(request.query["round"]):
        await turned.wait()
    return web.FileResponse(f"{directory}/global")
async def put(request):
    global turned
    with open(f"{directory}/{request.match_info['node']}", "wb") as out:
        async for chunk in request.content.iter_any():
            out.write(chunk)
        if durable:
            out.flush()
            await asyncio.to_thread(os.fsync, out.fileno())
    state["got"] += 1
    if state["got"] == clients:
        await asyncio.to_thread(average)
        state["got"], state["round"] = 0, state["round"] + 1
        old, turned = turned, asyncio.Event()
        old.set()
    return web.Response(status=204)
app = web.Application(client_max_size=1 << 40)
app.add_routes([web.get("/g", get), web.put("/u/{node}", put)])
web.run_app(app, host="127.0.0.1", port=port, print=None)
"""


async def floor_round(
    directory: Path, clients: int, body: Body, rounds: int, *, durable: bool
) -> dict[str, float]:
    """Return the median seconds of a round of the bare server, and its memory."""
    port = free_port()
    size = body.size // 4 * 4
    arguments = ["-c", FLOOR, str(directory), str(port), str(clients), str(size), str(int(durable))]
    server = await asyncio.create_subprocess_exec(sys.executable, *arguments)
    await wait_port(port)
    ends: list[list[float]] = [[] for _ in range(rounds + 1)]

    async def client(number: int) -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(None)) as session:
            for n in range(rounds + 1):
                await drain(session, f"http://127.0.0.1:{port}/g?round={n}")
                end, _ = body.of(number, n)
                headers = {"Content-Length": str(body.size)}
                url = f"http://127.0.0.1:{port}/u/{number}"
                async with session.put(url, data=body.stream(end), headers=headers) as response:
                    response.raise_for_status()
                ends[n].append(time.perf_counter())

    await asyncio.gather(*(client(number) for number in range(clients)))
    memory = peak_megabytes(server.pid)
    server.terminate()
    await server.wait()
    last = [max(end) for end in ends]
    took = [b - a for a, b in pairwise(last[1:])]
    return {"seconds": statistics.median(took), "memory_mb": memory}


async def measure(clients: int, body: Body, shape: ModelShape, rounds: int) -> dict[str, Any]:
    """Return both floors, the engine, and its ratio to each."""
    with ExitStack() as stack:
        first, second, third = (Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(3))
        floor = await floor_round(first, clients, body, rounds, durable=False)
        durable = await floor_round(second, clients, body, rounds, durable=True)
        engine = await engine_round(third, clients, body, shape, rounds)
    return {
        "engine": engine,
        "floor": floor,
        "durable_floor": durable,
        "ratio": engine["seconds"] / floor["seconds"],
        "durable_ratio": engine["seconds"] / durable["seconds"],
    }


def show(row: dict[str, Any]) -> None:
    """Print a line."""
    engine = row["engine"]
    print(
        f"{row['megabytes']:6.1f} MB × {row['clients']:2d}: {engine['seconds']:7.3f} s, "
        f"floor {row['floor']['seconds']:7.3f} s, ratio {row['ratio']:.2f}; "
        f"durable {row['durable_floor']['seconds']:7.3f} s, ratio {row['durable_ratio']:.2f}; "
        f"server {engine['memory_mb']:.0f} MB, loop blocked at most {engine['longest_block_ms']:.0f} ms, "
        f"{engine['longest_lag_ms']:.0f} ms with waits for a core",
        flush=True,
    )


async def main() -> None:
    """Measure every combination and write them down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[4, 8, 16, 64])
    parser.add_argument("--megabytes", type=float, nargs="+", default=[0.5, 10, 100])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "control_plane.json")
    options = parser.parse_args()
    rows = []
    for megabytes in options.megabytes:
        shape = shape_for(megabytes)
        body = Body(shape)
        for clients in options.clients:
            row = await measure(clients, body, shape, options.rounds)
            rows.append({"megabytes": megabytes, "clients": clients} | row)
            show(rows[-1])
            options.out.parent.mkdir(exist_ok=True)
            options.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    asyncio.run(main())
