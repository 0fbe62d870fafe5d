# SPDX-License-Identifier: Apache-2.0
"""The GPU of a Jetson whose NVML does not know it, from what the system reports of the chip."""

from pathlib import Path

from fedpipe_api.node import GpuDevice, NodeReason, Source

from ..reading import Reading

SOURCE: Source = "tegra"
NAME = "the system"
TIMED_OUT = FAILED = NodeReason.DEVICE_FAILED

CAPABILITY = {"33": "5.3", "24": "6.2", "25": "7.2", "35": "8.7", "38": "11.0"}
"""CUDA compute capability by /sys/devices/soc0/soc_id: T210, T186, T194, T234 (Orin), T264 (Thor)."""


def present(root: Path) -> bool:
    """Whether the chip is a Jetson's."""
    return _text(root / "sys/devices/soc0/family") == "Tegra"


def collect(root: Path) -> Reading:
    """Return the one GPU, or nothing where the chip is another."""
    if not present(root):
        return Reading()
    soc = root / "sys/devices/soc0"
    device = GpuDevice(
        uuid=f"tegra-{_text(soc / 'serial_number') or _text(soc / 'soc_id')}"[:128],
        name=(_text(soc / "machine") or "NVIDIA Jetson")[:128],
        compute_capability=CAPABILITY.get(_text(soc / "soc_id")),
        unified_memory=True,
    )
    return Reading(devices=(device,), message="a Jetson: the system reports its GPU, not NVML")


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
