# SPDX-License-Identifier: Apache-2.0
"""The conditions of a FedPipeNode: which troubles the facts amount to, each with a named reason."""

from collections.abc import Iterable
from datetime import datetime

from fedpipe_api import units
from fedpipe_api.conditions import Condition, set_condition
from fedpipe_api.node import (
    DEVICE_LOST,
    DRIVER_FAULT,
    MEMORY_PRESSURE,
    NODE_ADVICE,
    READY,
    FedPipeNodeStatus,
    GpuDevice,
    NodeReason,
)

from .reading import ABSENT, Reading

PRESSURE_BELOW = 0.10
PRESSURE_CLEARED_ABOVE = 0.15
"""Free shares of a device's memory at which MemoryPressure rises and clears; the gap stops flapping."""


def judge(
    reading: Reading,
    devices: tuple[GpuDevice, ...],
    *,
    declared: bool,
    before: FedPipeNodeStatus | None,
    now: datetime,
) -> tuple[Condition, ...]:
    """Return the four conditions. A transition time moves only when a status differs from the one before."""
    conditions = before.conditions if before else ()
    for kind, (state, reason, message) in {
        READY: _ready(reading, devices, declared),
        DRIVER_FAULT: _driver_fault(reading),
        DEVICE_LOST: _device_lost(reading),
        MEMORY_PRESSURE: _memory_pressure(devices, reading.processes, conditions),
    }.items():
        new = Condition(
            type=kind,
            status="True" if state else "False",
            reason=reason,
            message=message,
            last_transition_time=now,
        )
        conditions = set_condition(conditions, new)
    return conditions


def usable_devices(devices: Iterable[GpuDevice]) -> tuple[GpuDevice, ...]:
    """Return the devices a process can compute on: their memory is known and, with MIG, has instances."""
    return tuple(
        device
        for device in devices
        if device.total_memory is not None and (not device.mig_enabled or device.mig_instances)
    )


def _without_instances(device: GpuDevice) -> bool:
    return bool(device.mig_enabled) and not device.mig_instances


_State = tuple[bool, NodeReason, str]


def _ready(reading: Reading, devices: tuple[GpuDevice, ...], declared: bool) -> _State:
    if declared:
        return True, NodeReason.DECLARED, "the capacity is declared in a file"
    if reading.fault is not None and reading.silent:
        return False, reading.fault.reason, reading.fault.message
    if reading.silent:
        return False, reading.lost[0].reason, "no GPU answers"
    if not devices:
        return True, NodeReason.CPU_ONLY, "jobs run on the processor"
    if not usable_devices(devices):
        hidden = [device.name for device in devices if not _without_instances(device)]
        if hidden:
            message = (
                f"{hidden[0]} does not report its memory to the probe; give it access to the GPU devices"
            )
            return False, NodeReason.NO_PERMISSION, message
        return False, NodeReason.NO_MIG_INSTANCES, "MIG is enabled but there are no instances; create some"
    return True, NodeReason.GPU_READY, f"{len(devices)} of {len(devices) + len(reading.lost)} GPUs answer"


def _driver_fault(reading: Reading) -> _State:
    fault, boards = reading.fault, reading.boards
    if fault is None:
        if reading.devices or reading.lost:
            return False, NodeReason.DRIVER_LOADED, reading.message
        return False, NodeReason.NO_GPU, ""
    if fault.reason not in ABSENT:
        return True, fault.reason, fault.message
    if not boards:
        return False, NodeReason.NO_GPU, ""
    found = f"an {reading.vendor} board is" if boards == 1 else f"{boards} {reading.vendor} boards are"
    message = f"{found} on the PCI bus, but {fault.message}; install the driver to use it"
    return True, fault.reason, message


def _device_lost(reading: Reading) -> _State:
    if not reading.lost:
        return False, NodeReason.ALL_ANSWER, ""
    names = "; ".join(
        f"GPU {lost.index}{f' ({lost.uuid})' if lost.uuid else ''}: {lost.message}" for lost in reading.lost
    )
    actions = " ".join(dict.fromkeys(NODE_ADVICE[lost.reason].action for lost in reading.lost))
    return True, reading.lost[0].reason, f"{names}. {actions}"


def _memory_pressure(
    devices: tuple[GpuDevice, ...], processes: tuple[int | None, ...], before: tuple[Condition, ...]
) -> _State:
    already = any(known.type == MEMORY_PRESSURE and known.status == "True" for known in before)
    limit = PRESSURE_CLEARED_ABOVE if already else PRESSURE_BELOW
    for index, device in enumerate(devices):
        total, free = device.total_memory, device.free_memory
        if not total or free is None or free >= limit * total:
            continue
        count = (processes[index] if index < len(processes) else None) or 0
        message = f"{device.name} ({device.uuid}): {units.memory(free)} of {units.memory(total)} free"
        if count > 1:
            return True, NodeReason.MEMORY_SHARED, f"{message}; {count} processes compute on it"
        return True, NodeReason.MEMORY_IN_USE, message
    return False, NodeReason.MEMORY_FREE, ""
