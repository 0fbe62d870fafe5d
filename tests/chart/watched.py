# SPDX-License-Identifier: Apache-2.0
"""A real run under a real Prometheus: the engine with stand-in agents over HTTP, real probes beside it."""

import asyncio
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from aiohttp import web

from fedpipe_api.wire import Assignment, AssignmentKind, Progress
from fedpipe_operator import serving
from fedpipe_operator.coordinator import application
from fedpipe_operator.engine import Engine
from fedpipe_operator.engine.status import status
from fedpipe_operator.metrics import OperatorMetrics
from nvml import apiserver
from nvml.running import running
from nvml.standin import StandIn as Nvml
from nvml.standin import board
from standins.agents import StandIn
from standins.server import UID, identify, job

PROMETHEUS = shutil.which("prometheus")
SCRAPE_SECONDS = 1
NODES = 3
ROUNDS = 6


@asynccontextmanager
async def serve(handlers: web.Application) -> AsyncIterator[str]:
    """Serve an application on loopback; yield host and port."""
    site = await serving.serve(handlers, serving.listen("127.0.0.1", 0))
    try:
        yield f"127.0.0.1:{site.port}"
    finally:
        await site.close()


def metrics_of(figures: OperatorMetrics) -> web.Application:
    """Return an application that serves /metrics as the operator does."""

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=await figures.text(), content_type="text/plain")

    handlers = web.Application()
    handlers.add_routes([web.get("/metrics", metrics)])
    return handlers


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus."""

    address: str

    def _ask(self, path: str, **query: str | float) -> Any:
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str, at: float | None = None) -> list[dict[str, Any]]:
        """Return the series of an instant query."""
        return self._ask("query", query=expression, **({} if at is None else {"time": at}))["result"]

    def query_range(self, expression: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        """Return the series of a range query."""
        return self._ask("query_range", query=expression, start=start, end=end, step=step)["result"]

    def names(self) -> set[str]:
        """Return the names of all metrics it has seen."""
        return set(self._ask("label/__name__/values"))


@dataclass
class Working(StandIn):
    """A stand-in that reports its progress, and trains until Prometheus has seen it at its last step."""

    prometheus: Prometheus = field(kw_only=True)

    async def _train(self, work: Assignment) -> None:
        assert work.plan is not None
        for step in range(1, work.plan.local_steps + 1):
            progress = Progress(
                kind=AssignmentKind.TRAIN, round=work.round, state="training", step=step,
                steps=work.plan.local_steps, loss=1.0, memory=1 << 28, tokens_per_second=100.0,
            )  # fmt: skip
            async with self._session.post(
                f"{self.address()}/v1/progress", data=progress.to_json()
            ) as response:
                response.raise_for_status()
        since = time.time()
        while not await asyncio.to_thread(
            self.prometheus.query, f'timestamp(fedpipe_node_step{{node="{self.node}"}}) > {since}'
        ):
            await asyncio.sleep(SCRAPE_SECONDS / 5)
        await super()._train(work)


@contextmanager
def prometheus(
    directory: Path, targets: list[str], secure: dict[str, str] | None = None
) -> Iterator[Prometheus]:
    """Run a real Prometheus that scrapes the targets as the chart's monitors do; `secure` ones with a token."""
    assert PROMETHEUS is not None
    address = f"127.0.0.1:{_free_port()}"
    scrapes = [{"job_name": "fedpipe", "honor_labels": True, "static_configs": [{"targets": targets}]}]
    for target, token in (secure or {}).items():
        checked = {"scheme": "https", "authorization": {"credentials": token},
                   "tls_config": {"insecure_skip_verify": True}}  # fmt: skip
        scrapes.append(scrapes[0] | {"job_name": target, "static_configs": [{"targets": [target]}]} | checked)
    every = {"scrape_interval": f"{SCRAPE_SECONDS}s"}
    (directory / "prometheus.yml").write_text(yaml.safe_dump({"global": every, "scrape_configs": scrapes}))
    with (directory / "prometheus.log").open("w") as log:
        process = subprocess.Popen(
            [PROMETHEUS, f"--config.file={directory / 'prometheus.yml'}", f"--web.listen-address={address}",
             f"--storage.tsdb.path={directory / 'data'}"],
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        until = time.monotonic() + 30
        while not _is_ready(address):
            assert process.poll() is None, (directory / "prometheus.log").read_text()
            assert time.monotonic() < until, "Prometheus does not get ready"
            time.sleep(0.1)
        yield Prometheus(address)
    finally:
        process.terminate()
        process.wait(20)


def _is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/-/ready", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


@contextmanager
def probes(directory: Path, nodes: list[str]) -> Iterator[list[str]]:
    """Run a real probe for each node over a T4's NVML, and one more that has an API server; yield their targets."""
    targets = []
    with ExitStack() as stack:
        for node in nodes:
            (directory / node).mkdir()
            environment = Nvml(directory / node, board("t4")).environment
            port = _free_port()
            process = subprocess.Popen(
                [Path(sys.executable).with_name("fedpipe-agent"), "probe", "--node", node, "--interval", "1s",
                 "--metrics-port", str(port), "--cache", directory],
                env=environment | {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": "1"},
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            stack.callback(process.wait, 10)
            stack.callback(process.terminate)
            targets.append(f"127.0.0.1:{port}")
        folder = directory / "published"
        folder.mkdir()
        server = stack.enter_context(apiserver.serve(folder))
        port = _free_port()
        environment = Nvml(folder, board("t4")).environment
        often = ("--interval", "1s", "--heartbeat", "5s", "--cache", str(folder))
        stack.enter_context(running(server.cluster(), environment, *often, port=port))
        yield [*targets, f"127.0.0.1:{port}"]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


async def run(directory: Path) -> tuple[Prometheus, ExitStack]:
    """Run a job of six rounds under Prometheus; return it and what ends it."""
    stack = ExitStack()
    engine = Engine(directory / "store")
    await engine.start()
    looks = 0

    def age() -> float:
        return 1.0

    figures = OperatorMetrics(
        engine,
        directory / "store",
        lambda: {("GET", "200"): looks, ("PATCH", "409"): looks // 4},
        age,
        lambda: {"FedPipeNode": 1},
    )
    watches = [asyncio.create_task(figures.watch_lag()), asyncio.create_task(figures.watch_store())]
    try:
        async with (
            serve(metrics_of(figures)) as operator,
            serve(application(engine, identify)) as coordinator,
        ):
            nodes = [f"node-{number}" for number in range(NODES)]
            targets = stack.enter_context(probes(directory, nodes))
            watched = stack.enter_context(prometheus(directory, [operator, *targets]))
            await engine.submit(job(NODES, ROUNDS))
            await engine.set_eligible_nodes(UID, nodes)
            agents = [
                asyncio.create_task(
                    Working(node, f"token-{node}", lambda: f"http://{coordinator}", prometheus=watched).run()
                )
                for node in nodes
            ]
            while not engine.jobs[UID].state.finished:
                started = time.monotonic()
                await engine.moved(UID, 0.5)
                status(engine.jobs[UID].state, engine.jobs[UID].wait, {})
                figures.observe_reconcile(time.monotonic() - started)
                looks += 4
            await asyncio.gather(*agents)
            await asyncio.sleep(2 * SCRAPE_SECONDS)
    except BaseException:
        stack.close()
        raise
    finally:
        for watch in watches:
            watch.cancel()
        await engine.stop()
    return watched, stack
