# SPDX-License-Identifier: Apache-2.0
"""The operator at scale: FedPipeNodes, jobs and Pods on a real API server, agents that do everything but train.

`python tests/bench/operator_scale.py [--nodes 1000] [--jobs 100] [--agents 20] [--rounds 3] [--seconds 30] [--out FILE]`

First nobody asks anything of the operator but heartbeats of all FedPipeNodes at the probe's default rate; then all
jobs come at once. Agents run in this process and share one TLS configuration; `--seconds` is how long each "trains"
in a round, which spreads the load as training would. Figures are the operator's own metrics and what the system says
of its process; the loop's lag is separated from waiting for a core, since everything shares this machine.
"""

import argparse
import asyncio
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import psutil
from bench_machine import machine
from operator_scale_kubelets import Kubelets

from fedpipe_api.node import HEARTBEAT_SECONDS
from kube.cluster import Cluster
from kube.controlplane import ControlPlane, find_binaries, start_control_plane

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "operator.json"


def quantile(buckets: list[tuple[float, float]], share: float) -> float | None:
    """Return the upper bound of the histogram's bucket that holds the quantile; None above the last."""
    total = buckets[-1][1]
    found = next(bound for bound, count in buckets if count >= share * total)
    return None if found == math.inf else 1000 * found


class Scrape:
    """One scrape of the operator. Only what is needed is parsed: agents share this process."""

    def __init__(self, text: str) -> None:
        self._lines = text.splitlines()

    def total(self, name: str, label: str = "") -> float:
        """Return the sum over the samples that have the label."""
        lines = (line for line in self._lines if line.startswith((f"{name}{{", f"{name} ")))
        return sum(float(line.rpartition(" ")[2]) for line in lines if label in line)

    def buckets(self, name: str) -> list[tuple[float, float]]:
        """Return a histogram's buckets."""
        found = []
        for line in self._lines:
            if line.startswith(f"{name}_bucket{{"):
                found.append((float(line.split('le="')[1].split('"')[0]), float(line.rpartition(" ")[2])))
        return found


def difference(new: list[tuple[float, float]], old: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the histogram of what came between two scrapes."""
    before = dict(old)
    return [(bound, count - before.get(bound, 0.0)) for bound, count in new]


@dataclass
class Mark:
    """The operator at one moment."""

    scrape: Scrape
    at: float
    cpu: float
    resident: int
    took: float

    @property
    def done(self) -> float:
        """Rounds of all jobs."""
        return self.scrape.total("fedpipe_job_rounds", 'kind="done"')


class Watched:
    """The operator as a process."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._lag = cluster.directory / "lag"
        cluster.program = [sys.executable, str(HERE / "watched_operator.py"), str(self._lag)]

    def start(self) -> None:
        """Start it; returns when it is ready."""
        self._cluster.start_operator()
        assert self._cluster.operator is not None
        self._process = psutil.Process(self._cluster.operator.pid)

    def mark(self) -> Mark:
        """Scrape and look at the process."""
        begun = time.monotonic()
        text = self._cluster.get("/metrics", 60)
        took = time.monotonic() - begun
        assert text is not None, self._cluster.log()
        times, resident = self._process.cpu_times(), self._process.memory_info().rss
        return Mark(Scrape(text.decode()), time.monotonic(), times.user + times.system, resident, took)

    def lag(self, first: Mark, last: Mark) -> dict[str, float]:
        """Return quantiles of the loop's lag between two marks, in milliseconds; the operator has ended."""
        when, late, waited = np.fromfile(self._lag).reshape(-1, 3).T
        inside = (when >= first.at) & (when <= last.at)
        own = np.maximum(0, late - waited)
        figures = {}
        for name, values in (("loop_lag", late), ("loop_lag_but_for_cores", own)):
            for share in (50, 99):
                figures[f"{name}_p{share}_ms"] = round(1000 * float(np.percentile(values[inside], share)), 1)
            figures[f"{name}_max_ms"] = round(1000 * float(values[inside].max()), 1)
        return figures


def concurrently(call: Callable[[Any], Any], items: Iterable[Any]) -> None:
    """Call for every item from a few threads."""
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(call, items):
            pass


async def beat(cluster: Cluster, nodes: Sequence[str], seconds: float) -> int:
    """Let all nodes report at the probe's default rate; return how many reports that were."""
    pause = HEARTBEAT_SECONDS / len(nodes)
    until, sent = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        due = time.monotonic() + pause
        await asyncio.to_thread(cluster.report, nodes[sent % len(nodes)])
        sent += 1
        await asyncio.sleep(max(0.0, due - time.monotonic()))
    return sent


async def measure(options: argparse.Namespace, plane: ControlPlane, directory: Path) -> dict[str, Any]:
    """Build the fleet, run the jobs and return the figures."""
    cluster = Cluster(plane, "bench", directory)
    operator = Watched(cluster)
    groups = max(1, options.nodes // options.agents)
    nodes: list[str] = []

    def node(number: int) -> None:
        nodes.append(cluster.add_node(f"n{number}", group=f"g{number % groups}"))

    await asyncio.to_thread(concurrently, node, range(options.nodes))
    kubelets = Kubelets(plane, cluster.namespace, options.seconds)
    started = time.monotonic()
    await asyncio.to_thread(operator.start)
    ready = time.monotonic() - started
    print(f"ready after {ready:.1f} s with {options.nodes} nodes", flush=True)
    await asyncio.sleep(5)
    marks = [await asyncio.to_thread(operator.mark)]
    await asyncio.sleep(options.idle)
    marks.append(await asyncio.to_thread(operator.mark))
    reports = await beat(cluster, nodes, options.beats)
    marks.append(await asyncio.to_thread(operator.mark))
    at_rest, beating, submitted = marks

    playing = asyncio.create_task(kubelets.run())
    await asyncio.to_thread(
        concurrently, lambda number: submit(cluster, options, number), range(options.jobs)
    )
    print(f"submitted in {time.monotonic() - submitted.at:.1f} s", flush=True)
    while marks[-1].done < options.jobs * options.rounds and time.monotonic() - submitted.at < options.limit:
        await asyncio.sleep(10)
        if playing.done():
            playing.result()
        marks.append(await asyncio.to_thread(operator.mark))
        up = marks[-1].scrape.total("fedpipe_node_up")
        passed = marks[-1].at - submitted.at
        print(
            f"{passed:.0f} s: {kubelets.started} Pods, {up:.0f} agents, {marks[-1].done:.0f} rounds",
            flush=True,
        )
    await asyncio.to_thread(cluster.stop_operator)
    playing.cancel()
    await asyncio.gather(playing, return_exceptions=True)
    last = marks[-1]
    first = next((mark for mark in marks if mark.done >= options.jobs), last)
    figures: dict[str, Any] = {
        "nodes": options.nodes,
        "jobs": options.jobs,
        "pods": kubelets.started,
        "rounds": last.done,
        "seconds_to_ready": round(ready, 1),
        "seconds": round(last.at - submitted.at, 1),
        "memory_idle_mib": submitted.resident >> 20,
        "memory_peak_mib": max(mark.resident for mark in marks) >> 20,
        "scrape_seconds_max": round(max(mark.took for mark in marks), 3),
        "scrape_seconds_median": round(statistics.median(mark.took for mark in marks[3:]), 3),
        "at_rest": {"percent_of_a_core": percent(at_rest, beating)},
        "heartbeats": {
            "reports_per_second": round(reports / (submitted.at - beating.at), 2),
            "percent_of_a_core": percent(beating, submitted),
        }
        | operator.lag(beating, submitted),
        "whole_run": summary(submitted, last) | operator.lag(submitted, last),
    }
    spent, rounds = requests(last.scrape) - requests(first.scrape), last.done - first.done
    if rounds:
        figures["training"] = summary(first, last) | operator.lag(first, last)
        figures["training"] |= {"rounds": rounds, "api_writes_per_round": round(spent / rounds, 2)}
    return figures


def submit(cluster: Cluster, options: argparse.Namespace, number: int) -> None:
    """Create one job over one group of nodes."""
    groups = max(1, options.nodes // options.agents)
    rounds = {
        "count": options.rounds, "localSteps": 2, "minUpdates": options.agents, "deadline": "30m"
    }  # fmt: skip
    cluster.submit(
        f"job-{number}",
        nodes={"selector": {"matchLabels": {"group": f"g{number % groups}"}}, "min": options.agents},
        rounds=rounds,
        adapter={"ranks": {"min": 2, "max": 4}, "selection": {"mode": "all"}},
    )


def percent(first: Mark, last: Mark) -> float:
    """Return how much of a core the operator took between two marks."""
    return round(100 * (last.cpu - first.cpu) / (last.at - first.at), 1)


def requests(found: Scrape) -> float:
    """Return the writes for jobs: status and Events, not Pods, TokenReviews or FedPipeNodes."""
    name = "fedpipe_operator_api_requests_total"
    return found.total(name, 'verb="status"') + found.total(name, 'verb="event"')


def summary(first: Mark, last: Mark) -> dict[str, Any]:
    """Return what one look at a job took, by the operator's own histogram, and the operator's CPU."""
    name = "fedpipe_operator_reconcile_seconds"
    buckets = difference(last.scrape.buckets(name), first.scrape.buckets(name))
    figures = {f"reconcile_p{share * 100:.0f}_ms_at_most": quantile(buckets, share) for share in (0.5, 0.99)}
    return figures | {
        "seconds": round(last.at - first.at, 1), "percent_of_a_core": percent(first, last)
    }  # fmt: skip


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=100)
    parser.add_argument("--agents", type=int, default=20, help="Pods of each job.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=30, help="An agent's training in a round.")
    parser.add_argument("--idle", type=float, default=20, help="Seconds at rest.")
    parser.add_argument("--beats", type=float, default=60, help="Seconds of heartbeats.")
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
    described = machine() | {"load_average": [round(load, 1) for load in os.getloadavg()]}
    text = json.dumps({"machine": described, "figures": result}, indent=2)
    options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
