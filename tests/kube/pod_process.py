# SPDX-License-Identifier: Apache-2.0
"""Processes that play Pods: what a Pod says, turned into a command on this machine."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedpipe_operator.kube import command
from fedpipe_operator.kube.views import TRACKER, WRITER
from kube import agent_process
from kube.kubelet import Process
from standins.forked import Forked

HERE = Path(__file__).resolve().parent
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent}:{os.environ.get('PYTHONPATH', '')}"}


def stand_in_agent(pod: dict[str, Any], directory: Path) -> Process:
    """Start a stand-in agent for a Pod."""
    main: Callable[[], object] = agent_process.main
    arguments = local_arguments(pod, directory, {})
    container = pod["spec"]["containers"][0]
    if container["name"] in (WRITER, TRACKER):
        main = command.main
        output, credentials = str(directory.parents[1] / "output"), str(directory / "credentials")
        arguments = [
            output + one.removeprefix("/output") if one.startswith("/output") else one for one in arguments
        ]
        arguments = [credentials if one == "/var/run/credentials" else one for one in arguments]
        arguments.insert(0, container["command"][1])
    given = {e["name"]: e["value"] for e in container.get("env", ()) if "value" in e}
    environment = os.environ | given | ENVIRONMENT
    return Forked(main, arguments, directory / "log", environment, directory)


def local_arguments(pod: dict[str, Any], directory: Path, paths: dict[str, str]) -> list[str]:
    """Return the agent's arguments with the Pod's paths turned into this machine's."""
    known = {
        "/var/run/fedpipe/token": str(directory / "token"),
        "/var/run/fedpipe/ca.crt": str(directory / "ca.crt"),
    } | paths
    return [known.get(argument, argument) for argument in pod["spec"]["containers"][0]["args"]]
