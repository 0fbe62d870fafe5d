"""The operator at scale: FedPipeNodes, jobs and Pods on a real API server, agents that do everything but train.

`python tests/bench/operator_scale.py [--nodes 1000] [--jobs 100] [--agents 20] [--rounds 3] [--seconds 30] [--out FILE]`

Agents run in this process and share one TLS configuration; `--seconds` is how long each "trains" in a round, which
spreads the load as training would. Figures are the operator's own metrics and what the system says of its process.
"""

import argparse
import asyncio
import json
import random
import ssl
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import aiohttp
import psutil
from bench_machine import machine
from prometheus_client.parser import text_string_to_metric_families

from fedpipe_api.wire import Assignment, AssignmentKind
from kube.cluster import Cluster
from kube.controlplane import ControlPlane, find_binaries, start_control_plane
from standins.agents import StandIn

RESULT = Path(__file__).parent / "results" / "operator.json"


@dataclass
class Paced(StandIn):
    """Trains for some seconds; waits long between polls, as agents do."""

    context: ssl.SSLContext | None = None
    seconds: float = 0.0

    async def run(self) -> None:
        headers = {"Authorization": f"Bearer {self.token}"}
        assert self.context is not None
        connector = aiohttp.TCPConnector(ssl=self.context)
        async with aiohttp.ClientSession(headers=headers, connector=connector) as self._session:
            while True:
                try:
                    await self._register()
                    while True:
                        work = await self._work()
                        if work is not None and work.kind is AssignmentKind.STOP:
                            return
                except (aiohttp.ClientError, TimeoutError, ConnectionError):
                    await asyncio.sleep(1 + random.random())

    async def _train(self, work: Assignment) -> None:
        await asyncio.sleep(self.seconds * (0.7 + 0.6 * random.random()))
        await super()._train(work)


class Kubelets:
    """Binds every Pod, runs a paced agent for it, and ends it when the Pod is deleted."""

    def __init__(self, plane: ControlPlane, namespace: str, seconds: float) -> None:
        self._plane = plane
        self._pods = f"/api/v1/namespaces/{namespace}/pods"
        self._account = f"/api/v1/namespaces/{namespace}/serviceaccounts/default/token"
        self._authority = f"/api/v1/namespaces/{namespace}/configmaps/fedpipe-ca"
        self._seconds = seconds
        self._agents: dict[str, asyncio.Task[None]] = {}
        self._context: ssl.SSLContext | None = None
        self._limit = asyncio.Semaphore(16)
        self.started = 0

    async def run(self) -> None:
        """Watch Pods until cancelled."""
        api = ssl.create_default_context(cafile=self._plane.ca)
        headers = {"Authorization": f"Bearer {self._plane.token}"}
        connector = aiohttp.TCPConnector(ssl=api, limit=32)
        timeout = aiohttp.ClientTimeout(total=None)
        async with (
            aiohttp.ClientSession(
                self._plane.url, headers=headers, connector=connector, timeout=timeout, read_bufsize=1 << 22
            ) as self._api,
            asyncio.TaskGroup() as group,
        ):
            while True:
                listed = await self._send("GET", self._pods)
                for pod in listed["items"]:
                    self._see(group, pod)
                query = {"watch": "true", "resourceVersion": listed["metadata"]["resourceVersion"]}
                # The API server ends the watch of one who reads too slowly.
                async with self._api.get(self._pods, params=query) as response:
                    async for line in response.content:
                        event = json.loads(line)
                        if event["type"] in ("ADDED", "MODIFIED"):
                            self._see(group, event["object"])

    def _see(self, group: asyncio.TaskGroup, pod: dict[str, Any]) -> None:
        uid = pod["metadata"]["uid"]
        if uid not in self._agents:
            self._agents[uid] = group.create_task(self._play(pod))
        elif "deletionTimestamp" in pod["metadata"]:
            group.create_task(self._end(pod))

    async def _play(self, pod: dict[str, Any]) -> None:
        meta = pod["metadata"]
        name, node = meta["name"], meta["annotations"]["fedpipe.io/node"]
        binding = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": name},
            "target": {"name": node},
        }
        bound = {"apiVersion": "v1", "kind": "Pod", "name": name, "uid": meta["uid"]}
        request = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {"audiences": ["fedpipe"], "boundObjectRef": bound},
        }
        async with self._limit:
            await self._send("POST", f"{self._pods}/{name}/binding", binding)
            token = (await self._send("POST", self._account, request))["status"]["token"]
            if self._context is None:
                pem = (await self._send("GET", self._authority))["data"]["ca.crt"]
                self._context = ssl.create_default_context(cadata=pem)
            state = {"name": "agent", "image": "a", "imageID": "", "ready": True, "restartCount": 0}
            running = state | {"state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}}
            await self._status(name, {"phase": "Running", "containerStatuses": [running]})
        self.started += 1
        address = pod["spec"]["containers"][0]["args"][1]
        await Paced(node, token, lambda: address, context=self._context, seconds=self._seconds).run()
        ended = state | {"state": {"terminated": {"exitCode": 0, "finishedAt": "2026-01-01T00:00:00Z"}}}
        async with self._limit:
            await self._status(name, {"phase": "Succeeded", "containerStatuses": [ended]})

    async def _end(self, pod: dict[str, Any]) -> None:
        self._agents[pod["metadata"]["uid"]].cancel()
        await self._send("DELETE", f"{self._pods}/{pod['metadata']['name']}", {"gracePeriodSeconds": 0})

    async def _status(self, name: str, status: dict[str, Any]) -> None:
        kind = {"Content-Type": "application/merge-patch+json"}
        await self._send("PATCH", f"{self._pods}/{name}/status", {"status": status}, kind)

    async def _send(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> dict[str, Any]:
        async with self._api.request(method, path, json=body, headers=headers) as response:
            return dict(await response.json())


def quantile(buckets: list[tuple[float, float]], share: float) -> float:
    """Return the upper bound of the histogram's bucket that holds the quantile."""
    total = buckets[-1][1]
    return next(bound for bound, count in buckets if count >= share * total)


class Scrape:
    """One scrape of the operator."""

    def __init__(self, text: str) -> None:
        self._samples = [s for family in text_string_to_metric_families(text) for s in family.samples]

    def total(self, name: str, holds: Callable[[dict[str, str]], bool] = lambda labels: True) -> float:
        """Return the sum over the samples whose labels fit."""
        return sum(s.value for s in self._samples if s.name == name and holds(s.labels))

    def buckets(self, name: str) -> list[tuple[float, float]]:
        """Return a histogram's buckets."""
        return [(float(s.labels["le"]), s.value) for s in self._samples if s.name == f"{name}_bucket"]


def difference(new: list[tuple[float, float]], old: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the histogram of what came between two scrapes."""
    before = dict(old)
    return [(bound, count - before.get(bound, 0.0)) for bound, count in new]


def scrape(cluster: Cluster) -> Scrape:
    """Scrape the operator."""
    text = cluster.get("/metrics", 60)
    assert text is not None, cluster.log()
    return Scrape(text.decode())


def concurrently(call: Callable[[Any], Any], items: Iterable[Any]) -> None:
    """Call for every item from a few threads."""
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(call, items):
            pass


async def measure(options: argparse.Namespace, plane: ControlPlane, directory: Path) -> dict[str, Any]:
    """Build the fleet, run the jobs and return the figures."""
    cluster = Cluster(plane, "bench", directory)
    groups = max(1, options.nodes // options.agents)

    def node(number: int) -> None:
        cluster.add_node(f"n{number}", group=f"g{number % groups}")

    await asyncio.to_thread(concurrently, node, range(options.nodes))
    kubelets = Kubelets(plane, cluster.namespace, options.seconds)
    playing = asyncio.create_task(kubelets.run())
    started = time.monotonic()
    await asyncio.to_thread(cluster.start_operator)
    assert cluster.operator is not None
    process = psutil.Process(cluster.operator.pid)
    print(f"ready after {time.monotonic() - started:.1f} s with {options.nodes} nodes", flush=True)
    idle = process.memory_info().rss

    def submit(number: int) -> None:
        cluster.submit(
            f"job-{number}",
            nodes={"selector": {"matchLabels": {"group": f"g{number % groups}"}}, "min": options.agents},
            rounds={
                "count": options.rounds, "localSteps": 2, "minUpdates": options.agents, "deadline": "30m"
            },
            adapter={"ranks": {"min": 2, "max": 4}, "selection": {"mode": "all"}},
        )  # fmt: skip

    started = time.monotonic()
    await asyncio.to_thread(concurrently, submit, range(options.jobs))
    print(f"submitted in {time.monotonic() - started:.1f} s", flush=True)
    done = lambda s: s.total("fedpipe_job_rounds", lambda labels: labels["kind"] == "done")  # noqa: E731
    first = None
    peak = 0
    scrapes: list[float] = []
    while True:
        await asyncio.sleep(10)
        if playing.done():
            playing.result()
        begun = time.monotonic()
        found = await asyncio.to_thread(scrape, cluster)
        scrapes.append(time.monotonic() - begun)
        peak = max(peak, process.memory_info().rss)
        up, rounds = found.total("fedpipe_node_up"), done(found)
        passed = time.monotonic() - started
        print(f"{passed:.0f} s: {kubelets.started} Pods, {up:.0f} agents, {rounds:.0f} rounds", flush=True)
        if first is None and rounds >= options.jobs:
            first, steady_at = found, time.monotonic()
        if rounds >= options.jobs * options.rounds or time.monotonic() - started > options.limit:
            break
    last = found
    await asyncio.to_thread(cluster.stop_operator)
    playing.cancel()
    await asyncio.gather(playing, return_exceptions=True)
    figures: dict[str, Any] = {
        "nodes": options.nodes,
        "jobs": options.jobs,
        "pods": kubelets.started,
        "rounds": done(last),
        "seconds": round(time.monotonic() - started, 1),
        "memory_idle_mib": idle >> 20,
        "memory_peak_mib": peak >> 20,
        "scrape_seconds_max": round(max(scrapes), 3),
        "whole_run": summary(last, None),
    }
    if first is not None:
        spent, rounds = requests(last) - requests(first), done(last) - done(first)
        figures["training"] = summary(last, first) | {
            "seconds": round(time.monotonic() - steady_at, 1),
            "rounds": rounds,
            "api_writes_per_round": round(spent / rounds, 2) if rounds else None,
        }
    return figures


def requests(found: Scrape) -> float:
    """Return the writes for jobs: status and Events, not Pods, TokenReviews or FedPipeNodes."""
    status = found.total("fedpipe_operator_api_requests_total", lambda labels: labels["verb"] == "status")
    return status + found.total(
        "fedpipe_operator_api_requests_total", lambda labels: labels["verb"] == "event"
    )


def summary(last: Scrape, first: Scrape | None) -> dict[str, Any]:
    """Return the quantiles of the operator's histograms, in milliseconds."""
    figures = {}
    for short, name in (("reconcile", "reconcile_seconds"), ("loop_lag", "loop_lag_seconds")):
        buckets = last.buckets(f"fedpipe_operator_{name}")
        if first is not None:
            buckets = difference(buckets, first.buckets(f"fedpipe_operator_{name}"))
        for share in (0.5, 0.99):
            figures[f"{short}_p{share * 100:.0f}_ms_at_most"] = 1000 * quantile(buckets, share)
    return figures


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=100)
    parser.add_argument("--agents", type=int, default=20, help="Pods of each job.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=30, help="An agent's training in a round.")
    parser.add_argument("--limit", type=float, default=1800, help="Seconds after which the run ends.")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    binaries = find_binaries()
    if binaries is None:
        sys.exit("no kube-apiserver; set KUBEBUILDER_ASSETS")
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        (directory / "plane").mkdir()
        with start_control_plane(directory / "plane", binaries) as plane:
            plane.install_crds()
            result = asyncio.run(measure(options, plane, directory))
    text = json.dumps({"machine": machine(), "figures": result}, indent=2)
    options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
