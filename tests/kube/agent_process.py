# SPDX-License-Identifier: Apache-2.0
"""A stand-in agent as a program with the real agent's command line."""

import argparse
import asyncio
import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp

from fedpipe_api.wire import MANIFEST_HEADER, Assignment
from kube.gate import VARIABLE, Gate
from standins.agents import StandIn, make_update, manifest_of

RETRY_SECONDS = 0.2


class Obedient(StandIn):
    """Ends when the answer is that it is no agent, as the real one does: nothing but time would change that."""

    async def _register(self) -> None:
        with ending_when_refused():
            await super()._register()

    async def _work(self) -> Assignment | None:
        with ending_when_refused():
            return await super()._work()


@contextmanager
def ending_when_refused() -> Iterator[None]:
    """Exit for an answer 401."""
    try:
        yield
    except aiohttp.ClientResponseError as error:
        if error.status == 401:
            sys.exit(f"refused: {error}")
        raise


class Slow(Obedient):
    """Takes its time to train."""

    async def _train(self, work: Assignment) -> None:
        await asyncio.sleep(float(os.environ.get("STAND_IN_SECONDS", "0")))
        await super()._train(work)


class Gated(Obedient):
    """Works only as far as the gate lets it."""

    gate: Gate

    async def _register(self) -> None:
        await self.gate.come("register", self.node)
        await super()._register()

    async def _profile(self, work: Assignment) -> None:
        await self.gate.come("profile", self.node)
        await super()._profile(work)

    async def _train(self, work: Assignment) -> None:
        assert work.plan is not None
        await self.gate.come(f"train-{work.round}", self.node)
        body = make_update(self.shape, work.plan, self.node, work.round)
        manifest = manifest_of(body, work.plan, work.round, work.adapter)
        headers = {MANIFEST_HEADER: manifest.to_json(), aiohttp.hdrs.CONTENT_LENGTH: str(len(body))}
        url = f"{self.address()}/v1/rounds/{work.round}/update"
        async with self._session.put(url, data=self._halves(body, work.round), headers=headers) as response:
            response.raise_for_status()
        self.gate.arrive(f"answered-{work.round}", self.node)

    async def _halves(self, body: bytes, number: int) -> AsyncIterator[bytes]:
        yield body[: len(body) // 2]
        await self.gate.come(f"upload-{number}", self.node)
        yield body[len(body) // 2 :]


def own_node(coordinator: str, token: str, context: ssl.SSLContext) -> str:
    """Ask who we are, for as long as the coordinator is away, as the real agent does."""
    request = urllib.request.Request(f"{coordinator}/v1/job", headers={"Authorization": f"Bearer {token}"})
    while True:
        try:
            with urllib.request.urlopen(request, context=context, timeout=30) as response:
                return str(json.load(response)["node"])
        except urllib.error.HTTPError as error:
            if error.code < 500:
                raise
        except OSError:
            pass
        time.sleep(RETRY_SECONDS)


def main() -> None:
    """Be one agent."""
    parser = argparse.ArgumentParser()
    for name in ("coordinator", "model", "data", "token-file", "ca-file"):
        parser.add_argument(f"--{name}", required=True)
    options = parser.parse_args()
    token = Path(options.token_file).read_text()
    context = ssl.create_default_context(cafile=options.ca_file)
    node = own_node(options.coordinator, token, context)
    gate = os.environ.get(VARIABLE)
    agent = (Gated if gate else Slow)(node, token, lambda: options.coordinator, context=context)
    if isinstance(agent, Gated):
        agent.gate = Gate(Path(str(gate)))
    asyncio.run(agent.run())


if __name__ == "__main__":
    main()
