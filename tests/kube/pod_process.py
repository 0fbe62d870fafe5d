# SPDX-License-Identifier: Apache-2.0
"""Processes that play Pods: what a Pod says, turned into a command on this machine."""

import os
import sys
from pathlib import Path
from typing import Any

from kube.kubelet import Process, start_process

HERE = Path(__file__).resolve().parent
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent}:{os.environ.get('PYTHONPATH', '')}"}


def stand_in_agent(pod: dict[str, Any], directory: Path) -> Process:
    """Start a stand-in agent for a Pod."""
    script = [sys.executable, str(HERE / "agent_process.py")]
    arguments = local_arguments(pod, directory, {})
    container = pod["spec"]["containers"][0]
    if container["name"] == "output":
        script = [sys.executable, "-m", "fedpipe_operator.kube", "deliver"]
        output, credentials = str(directory.parents[1] / "output"), str(directory / "credentials")
        arguments = [
            output + one.removeprefix("/output") if one.startswith("/output") else one for one in arguments
        ]
        arguments = [credentials if one == "/var/run/credentials" else one for one in arguments]
    given = {e["name"]: e["value"] for e in container.get("env", ())}
    environment = os.environ | given | ENVIRONMENT | {"SSL_CERT_FILE": str(directory / "ca.crt")}
    return start_process([*script, *arguments], directory, environment)


def local_arguments(pod: dict[str, Any], directory: Path, paths: dict[str, str]) -> list[str]:
    """Return the agent's arguments with the Pod's paths turned into this machine's."""
    known = {
        "/var/run/fedpipe/token": str(directory / "token"),
        "/var/run/fedpipe/ca.crt": str(directory / "ca.crt"),
    } | paths
    return [known.get(argument, argument) for argument in pod["spec"]["containers"][0]["args"]]
