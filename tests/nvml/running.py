# SPDX-License-Identifier: Apache-2.0
"""Starts a real probe process against a stand-in NVML and a test API server."""

import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fedpipe_agent.probe.publish import Cluster

PROGRAM = """
import functools, sys
from pathlib import Path
from fedpipe_agent import cli
from fedpipe_agent.probe import command, publish
url, token, ca, root, *arguments = sys.argv[1:]
cluster = publish.Cluster(url, Path(token), Path(ca) if ca else None)
publish.Cluster.of_pod = classmethod(lambda cls: cluster)
command.Probe = functools.partial(command.Probe, root=Path(root))
sys.exit(cli.main(["probe", *arguments]))
"""
"""The probe as in a Pod; only the places of the API server, of the token and of /proc differ."""

MEMINFO = "MemTotal: 16000000 kB\nMemFree: 9000000 kB\nMemAvailable: 12000000 kB\n"
"""Memory on which nothing else happens."""


class Running:
    """A running probe."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process = process
        self._port = port

    def metrics(self) -> str:
        """Scrape it."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/metrics", timeout=5) as response:
            return response.read().decode()

    def metric(self, name: str) -> float:
        """Return the value of the one sample whose line starts so; 0 where there is none."""
        lines = [line for line in self.metrics().splitlines() if line.startswith(name)]
        return float(lines[0].rsplit(" ", 1)[1]) if lines else 0.0

    def stop(self) -> tuple[int, str]:
        """Send SIGTERM; return the exit code and the log."""
        self.process.send_signal(signal.SIGTERM)
        _, log = self.process.communicate(timeout=10)
        return self.process.returncode, log


@contextmanager
def running(cluster: Cluster, environment: dict[str, str], *arguments: str, port: int) -> Iterator[Running]:
    """Run a probe until the block ends."""
    root = cluster.token.parent / "root"
    (root / "proc/driver/nvidia").mkdir(parents=True, exist_ok=True)
    (root / "proc/meminfo").write_text(MEMINFO)
    cluster_arguments = [cluster.url, str(cluster.token), str(cluster.ca or ""), str(root)]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *cluster_arguments, "--metrics-port", str(port), *arguments],
        env=environment | {"KUBERNETES_SERVICE_HOST": "api"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield Running(process, port)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def until(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Return the first true value of the condition."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            value = condition()
        except OSError:
            value = None
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds:g} s")
