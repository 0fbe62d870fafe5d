# SPDX-License-Identifier: Apache-2.0
"""Holds stand-in agents at chosen steps, so that a test meets a job exactly where it wants to.

Steps of an agent: `register`, `profile`, and for every round N `train-N` (before anything is sent), `upload-N` (half
of the update is sent) and `answered-N` (the update was accepted; nobody is held here).
"""

import asyncio
from pathlib import Path
from typing import Any

PERIOD = 0.05
VARIABLE = "STAND_IN_GATE"


class Gate:
    """A directory that test and agents share: `STEP.NODE.here` says who came, `STEP.open` who may pass."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    @property
    def template(self) -> dict[str, Any]:
        """The podTemplate that leads agents through this gate."""
        variable = {"name": VARIABLE, "value": str(self._directory)}
        return {"spec": {"containers": [{"name": "agent", "env": [variable]}]}}

    def open(self, step: str, node: str = "") -> None:
        """Let all nodes pass a step, or only one."""
        (self._directory / _open(step, node)).touch()

    def at(self, step: str) -> set[str]:
        """Return the nodes whose agent has come to a step, now or before."""
        return {path.name.split(".")[1] for path in self._directory.glob(f"{step}.*.here")}

    def arrive(self, step: str, node: str) -> None:
        """Say that a node's agent has come to a step."""
        (self._directory / f"{step}.{node}.here").touch()

    async def come(self, step: str, node: str) -> None:
        """Say so and wait until the node may pass."""
        self.arrive(step, node)
        while not any((self._directory / _open(step, who)).exists() for who in ("", node)):
            await asyncio.sleep(PERIOD)


def _open(step: str, node: str) -> str:
    return f"{step}.{node}.open" if node else f"{step}.open"
