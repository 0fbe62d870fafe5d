# SPDX-License-Identifier: Apache-2.0
"""What the system itself reports: processor, memory, cache disk, NVIDIA hardware that NVML does not see."""

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from fedpipe_api import memory
from fedpipe_api.node import Cpu, GpuDevice

TEGRA_CAPABILITY = {"33": "5.3", "24": "6.2", "25": "7.2", "35": "8.7", "38": "11.0"}
"""CUDA compute capability by /sys/devices/soc0/soc_id: T210, T186, T194, T234 (Orin), T264 (Thor)."""


@dataclass(frozen=True)
class Host:
    """One look at the system; `tegra` is a Jetson's GPU, `boards` the count of NVIDIA GPUs on PCI."""

    cpu: Cpu
    tegra: GpuDevice | None = None
    boards: int = 0


def read(cache: Path | None, *, limited: bool, root: Path = Path("/")) -> Host:
    """Return what the system reports.

    cache: directory of the model cache, whose file system's free bytes are reported; null without it.
    limited: keep to this process's control groups and CPU affinity. A probe in a Pod speaks for the whole
    node and must not: its own limits are small.
    root: where /proc and /sys are found.
    """
    cores = os.cpu_count() or 1
    total, free = memory.read(root, limited=limited)
    if limited:
        cores = min(cores, len(os.sched_getaffinity(0)))
        for group in memory.unified_groups(root):
            cores = min(cores, _core_limit(group) or cores)
    disk = None
    if cache is not None:
        # A cache that went away has no size.
        with contextlib.suppress(OSError):
            disk = shutil.disk_usage(cache).free
    cpu = Cpu(cores=cores, total_memory=total, free_memory=free, cache_disk_free=disk)
    return Host(cpu=cpu, tegra=_tegra(root), boards=_boards(root))


def _core_limit(group: Path) -> int | None:
    quota, _, period = _text(group / "cpu.max").partition(" ")
    if not quota.isdigit():
        return None
    return max(1, round(int(quota) / int(period)))


def _tegra(root: Path) -> GpuDevice | None:
    soc = root / "sys/devices/soc0"
    if _text(soc / "family") != "Tegra":
        return None
    return GpuDevice(
        uuid=f"tegra-{_text(soc / 'serial_number') or _text(soc / 'soc_id')}"[:128],
        name=(_text(soc / "machine") or "NVIDIA Jetson")[:128],
        compute_capability=TEGRA_CAPABILITY.get(_text(soc / "soc_id")),
        unified_memory=True,
    )


def _boards(root: Path) -> int:
    """Count NVIDIA's (vendor 0x10de) display controllers (class 0x03)."""
    count = 0
    for device in (root / "sys/bus/pci/devices").glob("*"):
        if _text(device / "vendor") == "0x10de" and _text(device / "class").startswith("0x03"):
            count += 1
    return count


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
