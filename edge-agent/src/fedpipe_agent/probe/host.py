# SPDX-License-Identifier: Apache-2.0
"""What the system itself reports: processor, memory, cache disk."""

import contextlib
import os
import shutil
from pathlib import Path

from fedpipe_api import host_memory
from fedpipe_api.node import Cpu


def read(cache: Path | None, *, limited: bool, root: Path = Path("/")) -> Cpu:
    """Return what the system reports.

    cache: directory of the model cache, whose file system's free bytes are reported; null without it.
    limited: keep to this process's control groups and CPU affinity. A probe in a Pod speaks for the whole
    node and must not: its own limits are small.
    root: where /proc and /sys are found.
    """
    cores = os.cpu_count() or 1
    total, free = host_memory.read(root, limited=limited)
    if limited:
        cores = min(cores, len(os.sched_getaffinity(0)))
        for group in host_memory.unified_groups(root):
            cores = min(cores, _core_limit(group) or cores)
    disk = None
    if cache is not None:
        # A cache that went away has no size.
        with contextlib.suppress(OSError):
            disk = shutil.disk_usage(cache).free
    return Cpu(cores=cores, total_memory=total, free_memory=free, cache_disk_free=disk)


def _core_limit(group: Path) -> int | None:
    quota, _, period = _text(group / "cpu.max").partition(" ")
    if not quota.isdigit():
        return None
    return max(1, round(int(quota) / int(period)))


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
