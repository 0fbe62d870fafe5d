# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C at the command line: whenever it comes, no traceback and nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from agent_fixtures import save_tiny_model

FEDPIPE = str(Path(sys.executable).with_name("fedpipe"))
SECONDS = 120.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A directory with a job, a fleet of two nodes and their data."""
    root = tmp_path_factory.mktemp("inputs")
    save_tiny_model("bert", root / "model")
    (root / "data").mkdir()
    (root / "data/train.jsonl").write_text('{"text": "x", "label": "b"}\n' * 50)
    job = {
        "metadata": {"name": "words"},
        "spec": {
            "model": {
                "hostPath": {"path": "/model"},
                "task": "sequence-classification",
                "labels": ["a", "b"],
            },
            "data": {"train": "train.jsonl", "maxLength": 8},
            "rounds": {"count": 1000, "localSteps": 2, "batchSize": 4},
        },
    }
    nodes = [{"name": f"edge-{i}", "data": "data", "threads": 1, "precisions": ["fp32"]} for i in range(2)]
    (root / "job.yaml").write_text(yaml.safe_dump(job))
    (root / "fleet.yaml").write_text(yaml.safe_dump({"model": "model", "nodes": nodes}))
    return root


def started(command, inputs, temporary):
    """Start `fedpipe` as the first of a process group, as a shell does."""
    return subprocess.Popen(
        [FEDPIPE, command, "job.yaml", "--fleet", "fleet.yaml", *(["--out", "run"] if command == "run" else [])],
        cwd=inputs, env=os.environ | {"TMPDIR": str(temporary)}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1,
    )  # fmt: skip


def interrupted(process):
    """Interrupt the whole group, as a terminal does; return what the command printed since."""
    os.killpg(process.pid, signal.SIGINT)
    out, error = process.communicate(timeout=SECONDS)
    assert process.returncode in (130, -signal.SIGINT), (out, error)
    assert "Traceback" not in out + error
    assert "Exception" not in out + error
    return error


def wait_until(there):
    end = time.monotonic() + SECONDS
    while not there():
        assert time.monotonic() < end
        time.sleep(0.01)


def loaded(process, library):
    """Whether the process has a library in memory: how far its imports are."""
    try:
        return library in Path(f"/proc/{process.pid}/maps").read_text()
    except OSError:
        return True


@pytest.mark.parametrize("library", ["pydantic_core", "numpy", "scipy"])
def test_an_import_is_interrupted(library, inputs, tmp_path):
    process = started("plan", inputs, tmp_path)
    wait_until(lambda: loaded(process, library))
    interrupted(process)
    assert not list(tmp_path.glob("fedpipe-plan-*"))


def test_the_reading_of_data_and_model_is_interrupted(inputs, tmp_path):
    process = started("plan", inputs, tmp_path)
    wait_until(lambda: list(tmp_path.glob("fedpipe-plan-*/*.json")))
    interrupted(process)
    assert not list(tmp_path.glob("fedpipe-plan-*"))


def test_a_run_is_interrupted_while_its_agents_start(inputs, tmp_path):
    process = started("run", inputs, tmp_path)
    wait_until((inputs / "run/agents/edge-1/capacity.json").exists)
    assert "suspended before round 1; go on with: fedpipe run job.yaml" in interrupted(process)
