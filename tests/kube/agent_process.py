"""A stand-in agent as a program with the real agent's command line."""

import argparse
import asyncio
import json
import os
import ssl
import urllib.request
from pathlib import Path

from fedpipe_api.wire import Assignment
from standins.agents import StandIn

SECONDS = float(os.environ.get("STAND_IN_SECONDS", "0"))


class Slow(StandIn):
    """Takes its time to train."""

    async def _train(self, work: Assignment) -> None:
        await asyncio.sleep(SECONDS)
        await super()._train(work)


parser = argparse.ArgumentParser()
for name in ("coordinator", "model", "data", "token-file", "ca-file"):
    parser.add_argument(f"--{name}", required=True)
options = parser.parse_args()
token = Path(options.token_file).read_text()
context = ssl.create_default_context(cafile=options.ca_file)
request = urllib.request.Request(
    f"{options.coordinator}/v1/job", headers={"Authorization": f"Bearer {token}"}
)
with urllib.request.urlopen(request, context=context, timeout=30) as response:
    node = json.load(response)["node"]
asyncio.run(Slow(node, token, lambda: options.coordinator).run())
