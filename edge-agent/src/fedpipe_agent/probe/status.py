# SPDX-License-Identifier: Apache-2.0
"""From facts to a FedPipeNode's status: pure functions, no clock, no file, no network."""

from collections.abc import Iterable
from datetime import datetime

from fedpipe_api.node import (
    Capacity,
    Cpu,
    FedPipeNodeStatus,
    GpuDevice,
    PrecisionSupport,
    Source,
)
from fedpipe_api.precisions import Precision

from . import summary
from .conditions import judge, usable_devices
from .reading import Reading

FREE_MOVED = 0.05
LINK_RATE_MOVED = 0.20
"""Shares by which free bytes (of the total) and the link rate must move to be worth a write."""

NO_ANSWER = "GPU (no answer)"


def build(
    reading: Reading | None,
    cpu: Cpu,
    *,
    now: datetime,
    capacity: Capacity | None = None,
    verified: Iterable[PrecisionSupport] = (),
    link_rate: int | None = None,
    before: FedPipeNodeStatus | None = None,
) -> FedPipeNodeStatus:
    """Return what to report.

    A declared capacity stands in for the hardware; `reading` is then None, and precisions that it does not
    name are left out. `verified` precisions, proven by a kernel, replace those derived from compute
    capability. `before` is the last status; it keeps transition times, and a memory pressure until it has
    clearly gone.
    """
    if capacity is not None:
        devices, cpu = _declared_devices(capacity), _declared_cpu(capacity, cpu)
        derived = [PrecisionSupport(precision=precision) for precision in capacity.precisions]
        verified = [support for support in verified if support.precision in capacity.precisions]
        link_rate = capacity.link_rate or link_rate
        found = Reading()
    else:
        found = reading or Reading()
        devices = tuple(_with_shared_memory(device, cpu) for device in found.devices)
        derived = [] if found.silent else _derived_precisions(devices)
    precisions = _merge(derived, verified)
    return FedPipeNodeStatus(
        source=_source(capacity, found, devices),
        driver_version=found.driver_version,
        cuda_version=found.cuda_version,
        devices=devices,
        cpu=cpu,
        precisions=precisions,
        link_rate=link_rate,
        observed_at=now,
        device_summary=NO_ANSWER if found.silent else summary.devices(devices, capacity),
        memory_summary=summary.memory(devices),
        free_summary=summary.NOTHING if found.silent else summary.free(devices, cpu),
        precision_summary=",".join(support.precision for support in precisions if support.usable),
        conditions=judge(found, devices, declared=capacity is not None, before=before, now=now),
    )


def moved(written: FedPipeNodeStatus, current: FedPipeNodeStatus) -> str | None:
    """Return what moved far enough since `written` to be worth a write, or None."""
    facts = {
        "conditions": (_states(written), _states(current)),
        "devices": (_static(written), _static(current)),
        "precisions": (_precision_facts(written), _precision_facts(current)),
    }
    for name, (old, new) in facts.items():
        if old != new:
            return name
    free = zip(_free(written), _free(current), strict=True)
    if any(abs(new - old) > FREE_MOVED * total for (old, total), (new, _) in free):
        return "free memory"
    if _apart(_disk(written), _disk(current), FREE_MOVED):
        return "cache disk"
    if _apart(written.link_rate, current.link_rate, LINK_RATE_MOVED):
        return "link rate"
    return None


def _declared_devices(capacity: Capacity) -> tuple[GpuDevice, ...]:
    if capacity.device == "cpu":
        return ()
    return (
        GpuDevice(
            uuid="declared",
            name=capacity.device,
            total_memory=capacity.memory,
            free_memory=capacity.memory,
        ),
    )


def _declared_cpu(capacity: Capacity, cpu: Cpu) -> Cpu:
    changes: dict[str, int] = {}
    if capacity.threads is not None:
        changes["cores"] = capacity.threads
    if capacity.memory is not None and capacity.device == "cpu":
        changes["total_memory"] = changes["free_memory"] = capacity.memory
    return cpu.model_copy(update=changes)


def _with_shared_memory(device: GpuDevice, cpu: Cpu) -> GpuDevice:
    """Fill in the system's memory where the board has none of its own."""
    if not device.unified_memory or device.total_memory is not None:
        return device
    return device.model_copy(
        update={"total_memory": cpu.total_memory, "free_memory": cpu.free_memory},
    )


def _derived_precisions(devices: tuple[GpuDevice, ...]) -> list[PrecisionSupport]:
    if not devices:
        return [PrecisionSupport(precision=precision) for precision in Precision]
    usable = usable_devices(devices)
    if not usable:
        return []
    return [_derived(precision, usable) for precision in Precision]


def _derived(precision: Precision, devices: tuple[GpuDevice, ...]) -> PrecisionSupport:
    """Return whether every device has the precision: an agent may land on any of them."""
    needed = precision.capability
    if needed is None:
        return PrecisionSupport(precision=precision)
    for device in devices:
        if device.compute_capability is None:
            message = f"{device.name} does not report its compute capability; the kernel check will decide"
        elif _capability(device.compute_capability) < needed:
            message = (
                f"{device.name} has compute capability {device.compute_capability}; "
                f"{precision} needs {needed[0]}.{needed[1]}"
            )
        else:
            continue
        return PrecisionSupport(precision=precision, usable=False, message=message)
    return PrecisionSupport(precision=precision)


def _capability(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return int(major), int(minor)


def _merge(
    derived: Iterable[PrecisionSupport], verified: Iterable[PrecisionSupport]
) -> tuple[PrecisionSupport, ...]:
    known = {support.precision: support for support in derived}
    known |= {support.precision: support for support in verified}
    return tuple(known[precision] for precision in Precision if precision in known)


def _source(capacity: Capacity | None, reading: Reading, devices: tuple[GpuDevice, ...]) -> Source:
    if capacity is not None:
        return "declared"
    return reading.source if devices or reading.silent else "cpu"


def _states(status: FedPipeNodeStatus) -> dict[str, tuple[str, str]]:
    return {condition.type: (condition.status, condition.reason) for condition in status.conditions}


def _static(status: FedPipeNodeStatus) -> tuple[object, ...]:
    devices = tuple(
        device.model_copy(
            update={
                "free_memory": None,
                "utilization": None,
                "mig_instances": tuple(
                    instance.model_copy(update={"free_memory": None}) for instance in device.mig_instances
                ),
            }
        )
        for device in status.devices
    )
    cpu = status.cpu and (status.cpu.cores, status.cpu.total_memory)
    return status.source, status.driver_version, status.cuda_version, devices, cpu


def _precision_facts(status: FedPipeNodeStatus) -> list[tuple[str, bool, bool]]:
    return [(support.precision, support.usable, support.verified) for support in status.precisions]


def _free(status: FedPipeNodeStatus) -> list[tuple[int, int]]:
    """Return (free, total) bytes of every device, instance and the system, in a fixed order."""
    pairs = []
    for device in status.devices:
        pairs.append((device.free_memory or 0, device.total_memory or 0))
        pairs += [(instance.free_memory or 0, instance.total_memory) for instance in device.mig_instances]
    if status.cpu:
        pairs.append((status.cpu.free_memory, status.cpu.total_memory))
    return pairs


def _disk(status: FedPipeNodeStatus) -> int | None:
    return status.cpu.cache_disk_free if status.cpu else None


def _apart(old: int | None, new: int | None, share: float) -> bool:
    if old is None or new is None:
        return old is not new
    return abs(new - old) > share * max(old, new)
