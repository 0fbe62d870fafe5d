# SPDX-License-Identifier: Apache-2.0
"""An engine with its coordinator on a loopback port, and stand-in agents around it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from fedpipe_api.wire import ModelShape
from fedpipe_operator.coordinator import application
from fedpipe_operator.engine import Engine
from fedpipe_operator.serving import listen, serve
from standins.agents import StandIn, model_shape
from standins.server import UID, identify, job


@dataclass
class Local:
    """A running engine; `address` is its base URL."""

    engine: Engine
    address: str
    nodes: list[str]

    def agent(self, node: str, shape: ModelShape | None = None) -> StandIn:
        """Return a stand-in for a node, not yet running."""
        return StandIn(node, f"token-{node}", lambda: self.address, shape or model_shape())

    async def finish(self, seconds: float = 60) -> None:
        """Wait until the job is done."""
        async with asyncio.timeout(seconds):
            while not self.engine.jobs[UID].state.finished:
                await self.engine.moved(UID, 1)


@asynccontextmanager
async def local(
    directory: Path, nodes: int = 3, count: int = 3, method: str = "exact", **spec: object
) -> AsyncIterator[Local]:
    """Serve one job in this process."""
    engine = Engine(directory)
    await engine.start()
    site = await serve(application(engine, identify), listen("127.0.0.1", 0), shutdown_timeout=1)
    names = [f"node-{i}" for i in range(nodes)]
    await engine.submit(job(nodes, count, method, **spec))
    await engine.set_eligible_nodes(UID, names)
    try:
        yield Local(engine, f"http://127.0.0.1:{site.port}", names)
    finally:
        await site.close()
        await engine.stop()


@asynccontextmanager
async def working(agents: list[StandIn]) -> AsyncIterator[None]:
    """Let agents run for the time of the block."""
    tasks = [asyncio.create_task(agent.run()) for agent in agents]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
