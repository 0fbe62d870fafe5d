# SPDX-License-Identifier: Apache-2.0
"""What the probe makes of an NVML that refuses single questions, and what the operator then plans with."""

from pathlib import Path
from typing import Any

import pytest

from fedpipe_agent.probe import status
from fedpipe_api.node import DEVICE_LOST, READY, FedPipeNodeStatus
from fedpipe_operator.kube.views import CapacityView, capacity_view
from nvml import golden
from nvml.standin import StandIn, board

GIB = 2**30


def with_first(name: str, **answers: Any) -> dict[str, Any]:
    """Return a board's script with other answers of its first device."""
    script = board(name)
    script["devices"][0] |= answers
    return script


def look(directory: Path, script: dict[str, Any]) -> FedPipeNodeStatus:
    return status.build(StandIn(directory, script).read(), golden.CPU, now=golden.NOW)


def view(built: FedPipeNodeStatus) -> CapacityView:
    return capacity_view({"metadata": {"name": "edge-1"}, "status": built.to_dict()})


def reason(built: FedPipeNodeStatus, kind: str) -> str:
    return next(known.reason for known in built.conditions if known.type == kind)


@pytest.mark.parametrize("answer", ["!NO_PERMISSION", "!NOT_SUPPORTED"])
def test_a_mig_board_that_hides_its_whole_memory_has_that_of_its_instances(
    tmp_path: Path, answer: str
) -> None:
    built = look(tmp_path, with_first("a100-mig", total=answer))
    [device] = built.devices
    parts = board("a100-mig")["devices"][0]["instances"]
    parts = [part for part in parts if isinstance(part, dict)]
    assert device.total_memory == sum(part["total"] for part in parts)
    assert device.free_memory == sum(part["free"] for part in parts)
    assert not device.unified_memory
    assert built.device_summary == "NVIDIA A100-SXM4-40GB (MIG, 3)"
    assert (built.memory_summary, built.free_summary) == ("20Gi,10Gi,5Gi", "19Gi")
    assert reason(built, READY) == "GpuReady"
    assert view(built).memory == device.total_memory


def test_mig_without_instances_and_figures_still_asks_for_instances(tmp_path: Path) -> None:
    built = look(tmp_path, with_first("a100-mig", total="!NO_PERMISSION", instances=[]))
    assert built.devices[0].total_memory is None
    assert reason(built, READY) == "NoMigInstances"
    assert view(built).memory == 0


def test_a_gpu_that_refuses_to_tell_its_memory_is_not_given_the_host_s(tmp_path: Path) -> None:
    built = look(tmp_path, with_first("t4", total="!NO_PERMISSION"))
    [device] = built.devices
    assert (device.name, device.total_memory, device.unified_memory) == ("Tesla T4", None, False)
    assert (built.memory_summary, built.free_summary) == ("–", "–")
    assert reason(built, READY) == "NoPermission"
    planned = view(built)
    assert planned.memory == 0
    assert planned.fault
    assert "does not report its memory" in planned.fault


def test_a_board_without_memory_of_its_own_has_the_host_s(tmp_path: Path) -> None:
    built = look(tmp_path, board("orin"))
    assert built.devices[0].unified_memory
    assert view(built).memory == golden.CPU.total_memory


def test_a_gpu_that_refuses_everything_is_reported_as_a_matter_of_rights(tmp_path: Path) -> None:
    built = look(tmp_path, board("t4") | {"devices": ["!NO_PERMISSION"]})
    assert (reason(built, READY), reason(built, DEVICE_LOST)) == ("NoPermission", "NoPermission")
    [message] = [known.message for known in built.conditions if known.type == DEVICE_LOST]
    assert "Give the probe access to the GPU devices" in message
    assert "reboot" not in message.lower()
