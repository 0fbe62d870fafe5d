# SPDX-License-Identifier: Apache-2.0
"""The texts of the printer columns."""

from collections.abc import Callable

from fedpipe_api.node import Capacity, Cpu, GpuDevice

NOTHING = "–"


def devices(devices: tuple[GpuDevice, ...], capacity: Capacity | None) -> str:
    """Return the devices' names, equal ones counted."""
    if not devices:
        return capacity.device if capacity else "cpu"
    names: dict[str, int] = {}
    for device in devices:
        name = device.name.removesuffix(" (nvgpu)")
        if device.unified_memory:
            name += " (unified)"
        elif device.mig_enabled:
            name += f" (MIG, {len(device.mig_instances)})"
        names[name] = names.get(name, 0) + 1
    parts = (f"{count} × {name}" if count > 1 else name for name, count in names.items())
    return ", ".join(parts)[:128]


def _sizes(devices: tuple[GpuDevice, ...]) -> list[tuple[int, int]]:
    """Return (total, free) bytes of every device that can be given to a process and reports its memory."""
    sizes = []
    for device in devices:
        parts = device.mig_instances if device.mig_enabled else (device,)
        sizes += [(part.total_memory, part.free_memory or 0) for part in parts if part.total_memory]
    return sizes


def memory(devices: tuple[GpuDevice, ...]) -> str:
    """Return the distinct sizes a process can be given, largest first."""
    totals = sorted({total for total, _ in _sizes(devices)}, reverse=True)
    texts = dict.fromkeys(_quantity(total, round) for total in totals)
    return ",".join(texts)[:32] or NOTHING


def free(devices: tuple[GpuDevice, ...], cpu: Cpu) -> str:
    """Return the most that one process could get."""
    free = [free for _, free in _sizes(devices)] if devices else [cpu.free_memory]
    return _quantity(max(free), int) if free else NOTHING


def _quantity(size: int, whole: Callable[[float], int]) -> str:
    for unit, name in ((2**30, "Gi"), (2**20, "Mi")):
        if size >= unit:
            return f"{whole(size / unit)}{name}"
    return f"{size}"
