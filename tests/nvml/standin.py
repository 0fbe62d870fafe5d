# SPDX-License-Identifier: Apache-2.0
"""Builds the stand-in for libnvidia-ml.so.1 and runs the probe's real NVML path over it."""

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pynvml
import pytest

from fedpipe_agent.probe.reading import Reading

HERE = Path(__file__).parent
BOARDS = HERE / "boards"
AGENT = Path(sys.executable).with_name("fedpipe-agent")
READ = """
import sys
from pathlib import Path
from fedpipe_agent.probe.missed_passes import Reader
print(Reader(float(sys.argv[1]), Path(sys.argv[2])).read().to_json())
"""


@functools.cache
def library() -> Path:
    """Compile the stand-in once; return its directory."""
    directory = Path(tempfile.mkdtemp(prefix="fedpipe-nvml-"))
    atexit.register(shutil.rmtree, directory)
    options = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(
        ["cc", *options, "-o", directory / "libnvidia-ml.so.1", HERE / "libnvidia-ml.c"], check=True
    )
    return directory


def board(name: str) -> dict[str, Any]:
    """Return a board's script."""
    return json.loads((BOARDS / f"{name}.json").read_text())


def flatten(script: dict[str, Any]) -> str:
    """Return the script as the `key=value` lines the C library reads."""
    lines = {"init": "ok", "shutdown": "ok"} | {
        key: value for key, value in script.items() if key != "devices"
    }
    devices = script.get("devices", [])
    lines.setdefault("count", len(devices))
    for index, device in enumerate(devices):
        _add(lines, f"device.{index}", device)
    return "".join(f"{key}={_value(value)}\n" for key, value in lines.items())


def _add(lines: dict[str, Any], prefix: str, device: dict[str, Any] | str) -> None:
    if isinstance(device, str):
        lines[prefix] = device
        return
    lines[prefix] = "ok"
    for key, value in device.items():
        if key == "instances":
            for index, instance in enumerate(value):
                _add(lines, f"{prefix}.instance.{index}", instance)
        else:
            lines[f"{prefix}.{key}"] = value


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, str) and value.startswith("!") and value not in ("!hang", "!crash"):
        return f"!{getattr(pynvml, f'NVML_ERROR_{value[1:]}')}"
    return str(value)


class StandIn:
    """One machine's NVML."""

    def __init__(self, directory: Path, script: dict[str, Any]) -> None:
        self._script = directory / "script"
        self.root = directory / "machine"
        (self.root / "proc/driver/nvidia").mkdir(parents=True, exist_ok=True)
        self.play(script)

    def play(self, script: dict[str, Any]) -> None:
        """Let the next init find this script."""
        fresh = self._script.with_suffix(".new")
        fresh.write_text(flatten(script))
        fresh.rename(self._script)

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a process that finds the stand-in as its NVML."""
        return os.environ | {"LD_LIBRARY_PATH": str(library()), "FEDPIPE_NVML_SCRIPT": str(self._script)}

    def read(self, timeout: float = 10.0) -> Reading:
        """Return what the probe's reader reads."""
        arguments = [sys.executable, "-c", READ, str(timeout), str(self.root)]
        done = subprocess.run(arguments, env=self.environment, capture_output=True, text=True, check=True)
        return Reading.model_validate_json(done.stdout)

    def probe(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `fedpipe-agent probe`."""
        return subprocess.run(
            [AGENT, "probe", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )


@pytest.fixture
def standin(tmp_path: Path) -> StandIn:
    """A machine with one T4, until it plays something else."""
    return StandIn(tmp_path, board("t4"))
