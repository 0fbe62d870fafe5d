# SPDX-License-Identifier: Apache-2.0
"""The probe on real NVIDIA hardware agrees with nvidia-smi and with torch."""

import json
import shutil
import subprocess
import sys

import pytest

from fedpipe_agent.probe.reading import Reading
from fedpipe_api.node import FedPipeNode, FedPipeNodeStatus
from nvml.standin import AGENT, READ

pytestmark = pytest.mark.gpu


def read() -> Reading:
    """Return a reading of a process of its own: the reader forks, which one with torch's threads may not."""
    command = [sys.executable, "-c", READ, "30", "/"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return Reading.model_validate_json(done.stdout)


@pytest.fixture(scope="module")
def reported() -> FedPipeNodeStatus:
    """What `fedpipe-agent probe --once --verify` says."""
    fault = read().fault
    if fault is not None:
        pytest.skip(f"no GPU: {fault.message}")
    done = subprocess.run(
        [AGENT, "probe", "--once", "--output", "json", "--verify", "--timeout", "30s"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    status = FedPipeNode.model_validate(json.loads(done.stdout)).status
    assert status is not None
    return status


def test_facts_agree_with_nvidia_smi(reported: FedPipeNodeStatus) -> None:
    if shutil.which("nvidia-smi") is None:
        pytest.skip("no nvidia-smi")
    query = "--query-gpu=uuid,name,compute_cap,memory.total,driver_version"
    done = subprocess.run(
        ["nvidia-smi", query, "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [line.split(", ") for line in done.stdout.splitlines()]
    assert len(rows) == len(reported.devices)
    for device, (uuid, name, capability, memory, driver) in zip(reported.devices, rows, strict=True):
        assert (device.uuid, device.name, device.compute_capability) == (uuid, name, capability)
        assert device.total_memory is not None
        assert abs(device.total_memory / 2**20 - float(memory)) < 1
        assert reported.driver_version == driver
    assert reported.source == "nvml"


def test_processes_are_those_of_nvidia_smi(reported: FedPipeNodeStatus) -> None:
    """Of which a container may see none, not even its own."""
    if shutil.which("nvidia-smi") is None:
        pytest.skip("no nvidia-smi")
    torch = pytest.importorskip("torch")
    torch.zeros(1, device="cuda")
    command = ["nvidia-smi", "--id=0", "--query-compute-apps=pid", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seen = [line for line in done.stdout.splitlines() if line.strip().isdigit()]
    assert (read().processes[0] or 0) == len(seen)


def test_free_memory_falls_by_what_a_process_takes(reported: FedPipeNodeStatus) -> None:
    torch = pytest.importorskip("torch")
    torch.zeros(1, device="cuda")
    before = read().devices[0].free_memory
    held = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    after = read()
    assert before is not None
    assert after.devices[0].free_memory is not None
    assert before - after.devices[0].free_memory == pytest.approx(held.numel(), rel=0.05)


def test_kernels_confirm_what_compute_capability_promised(reported: FedPipeNodeStatus) -> None:
    assert all(support.verified for support in reported.precisions)
    derived = {support.precision for support in reported.precisions if support.usable}
    assert {"fp32", "bf16", "int8", "nf4"} >= derived
    if float(reported.devices[0].compute_capability or 0) >= 8:
        assert len(derived) == 4, reported.precisions
