# SPDX-License-Identifier: Apache-2.0
"""GPU facts through NVML: init, read, shutdown on every pass, in a child process of its own.

A child, because NVML can hang inside the driver, can crash, and keeps the library it loaded first: after a
driver upgrade only a fresh process loads the new one. The parent never loads NVML.
"""

import contextlib
from collections.abc import Callable
from typing import Any

from pydantic import Field, ValidationError

from fedpipe_api.base import Model
from fedpipe_api.node import GpuDevice, MigInstance, NodeReason

from .child import Child, Died, Stuck, Wait

MAX_DEVICES = 64


class Fault(Model):
    """Why NVML reported nothing."""

    reason: NodeReason
    message: str = Field(max_length=512)


class Lost(Model):
    """A device that is counted but does not answer."""

    index: int
    uuid: str | None = None
    reason: NodeReason
    message: str = Field(max_length=512)


class Reading(Model):
    """One pass over NVML.

    A device with `unified_memory` has none of its own; one that does not report its memory to this user has
    `total_memory` null.
    """

    driver_version: str | None = None
    cuda_version: str | None = None
    devices: tuple[GpuDevice, ...] = Field(default=(), max_length=MAX_DEVICES)
    processes: tuple[int | None, ...] = Field(
        default=(), max_length=MAX_DEVICES, description="Compute processes on each device."
    )
    lost: tuple[Lost, ...] = Field(default=(), max_length=MAX_DEVICES)
    fault: Fault | None = None


class Reader:
    """Reads NVML in a child process, for at most `timeout` seconds."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._child = Child(timeout)

    def read(self, wait: Wait | None = None) -> Reading:
        """Return one reading; a hang, a crash or malformed output gives a fault. `wait`: see `Child.ask`."""
        try:
            return Reading.model_validate_json(self._child.ask(_read, wait))
        except Stuck:
            return _failed(
                NodeReason.NVML_TIMEOUT,
                "an NVML call hangs in the kernel since an earlier pass; reboot the node if it stays",
            )
        except TimeoutError:
            return _failed(NodeReason.NVML_TIMEOUT, f"NVML did not answer within {self._timeout:g} s")
        except Died as how:
            return _failed(NodeReason.NVML_FAILED, f"the process that reads NVML died {how}")
        except ValidationError as error:
            return _failed(NodeReason.NVML_FAILED, f"NVML answered nonsense: {error.errors()[0]['msg']}")


def _read() -> bytes:
    try:
        reading = collect()
    except Exception as error:
        reading = _failed(NodeReason.NVML_FAILED, f"NVML could not be read: {error!r}"[:512])
    return reading.to_json().encode()


def collect() -> Reading:
    """Return one reading, made in this process; it can hang. `Reader` is for long-lived processes."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Reading(fault=_fault(error))
    try:
        return _collect(pynvml)
    except pynvml.NVMLError as error:
        return Reading(fault=_fault(error))
    finally:
        # The process ends anyway; what was read stands.
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _collect(nvml: Any) -> Reading:
    devices: list[GpuDevice] = []
    processes: list[int | None] = []
    lost: list[Lost] = []
    cuda = _ask(nvml, nvml.nvmlSystemGetCudaDriverVersion_v2)
    for index in range(min(nvml.nvmlDeviceGetCount(), MAX_DEVICES)):
        uuid = None
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            uuid = _ask(nvml, nvml.nvmlDeviceGetUUID, handle)
            device = _device(nvml, handle, uuid or f"index-{index}")
            running = _ask(nvml, nvml.nvmlDeviceGetComputeRunningProcesses, handle)
        except nvml.NVMLError as error:
            if error.value in (nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, nvml.NVML_ERROR_DRIVER_NOT_LOADED):
                raise
            lost.append(Lost(index=index, uuid=uuid, reason=_lost_reason(nvml, error), message=str(error)))
        else:
            devices.append(device)
            processes.append(None if running is None else len(running))
    return Reading(
        driver_version=_ask(nvml, nvml.nvmlSystemGetDriverVersion),
        cuda_version=None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}",
        devices=tuple(devices),
        processes=tuple(processes),
        lost=tuple(lost),
    )


def _device(nvml: Any, handle: Any, uuid: str) -> GpuDevice:
    capability = _ask(nvml, nvml.nvmlDeviceGetCudaComputeCapability, handle)
    utilization = _ask(nvml, nvml.nvmlDeviceGetUtilizationRates, handle)
    power = _ask(nvml, nvml.nvmlDeviceGetEnforcedPowerLimit, handle)
    ecc = _ask(nvml, nvml.nvmlDeviceGetEccMode, handle)
    mig = _ask(nvml, nvml.nvmlDeviceGetMigMode, handle)
    instances = _instances(nvml, handle) if mig and mig[0] else ()
    memory, unsupported = _memory(nvml, handle)
    total, free = (memory.total, memory.free) if memory else _sum(instances)
    return GpuDevice(
        uuid=uuid[:128],
        name=(_ask(nvml, nvml.nvmlDeviceGetName, handle) or "NVIDIA GPU")[:128],
        compute_capability=f"{capability[0]}.{capability[1]}" if capability else None,
        total_memory=total,
        free_memory=free,
        unified_memory=unsupported and not (mig and mig[0]),
        utilization=utilization.gpu if utilization else None,
        power_limit=None if power is None else power / 1000,
        ecc=bool(ecc[0]) if ecc else None,
        mig_enabled=bool(mig[0]) if mig else None,
        mig_instances=instances,
    )


def _memory(nvml: Any, handle: Any) -> tuple[Any, bool]:
    """Return a board's memory or None, and whether NVML says that it has none."""
    try:
        return nvml.nvmlDeviceGetMemoryInfo(handle), False
    except nvml.NVMLError as error:
        if error.value not in (nvml.NVML_ERROR_NOT_SUPPORTED, nvml.NVML_ERROR_NO_PERMISSION):
            raise
        return None, error.value == nvml.NVML_ERROR_NOT_SUPPORTED


def _sum(instances: tuple[MigInstance, ...]) -> tuple[int | None, int | None]:
    """Return what a MIG board has in all: it reports the total to privileged users only."""
    total = sum(instance.total_memory for instance in instances)
    if not total:
        return None, None
    return total, sum(instance.free_memory or 0 for instance in instances)


def _instances(nvml: Any, handle: Any) -> tuple[MigInstance, ...]:
    found = []
    for index in range(min(_ask(nvml, nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0, MAX_DEVICES)):
        instance = _ask(nvml, nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, index)
        if instance is None:
            continue
        name = _ask(nvml, nvml.nvmlDeviceGetName, instance) or ""
        memory = _ask(nvml, nvml.nvmlDeviceGetMemoryInfo, instance)
        found.append(
            MigInstance(
                uuid=(_ask(nvml, nvml.nvmlDeviceGetUUID, instance) or f"index-{index}")[:128],
                profile=(name.rpartition("MIG ")[2] or "unknown")[:64],
                total_memory=memory.total if memory else 0,
                free_memory=memory.free if memory else None,
            )
        )
    return tuple(found)


def _ask(nvml: Any, question: Callable[..., Any], *arguments: Any) -> Any:
    """Return NVML's answer, or None where this board, driver or user has none."""
    try:
        return question(*arguments)
    except nvml.NVMLError as error:
        silent = (
            nvml.NVML_ERROR_NOT_SUPPORTED,
            nvml.NVML_ERROR_FUNCTION_NOT_FOUND,
            nvml.NVML_ERROR_NO_PERMISSION,
            nvml.NVML_ERROR_NOT_FOUND,
            nvml.NVML_ERROR_INVALID_ARGUMENT,
            nvml.NVML_ERROR_NO_DATA,
        )
        if error.value in silent:
            return None
        raise


def _fault_reasons(nvml: Any) -> dict[int, NodeReason]:
    return {
        nvml.NVML_ERROR_LIBRARY_NOT_FOUND: NodeReason.DRIVER_MISSING,
        nvml.NVML_ERROR_DRIVER_NOT_LOADED: NodeReason.DRIVER_NOT_LOADED,
        nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: NodeReason.DRIVER_MISMATCH,
        nvml.NVML_ERROR_NO_PERMISSION: NodeReason.NO_PERMISSION,
        nvml.NVML_ERROR_TIMEOUT: NodeReason.NVML_TIMEOUT,
    }


def _fault(error: Any) -> Fault:
    import pynvml

    reason = _fault_reasons(pynvml).get(error.value, NodeReason.NVML_FAILED)
    advice = {
        NodeReason.DRIVER_MISSING: "libnvidia-ml.so.1 is not found",
        NodeReason.DRIVER_NOT_LOADED: "the NVIDIA kernel driver is not loaded",
        NodeReason.DRIVER_MISMATCH: (
            "the driver's library and its kernel module differ, as after an upgrade; "
            "reload the module or reboot the node"
        ),
        NodeReason.NO_PERMISSION: "NVML refuses this user; give the probe access to the GPU devices",
    }
    return Fault(reason=reason, message=advice.get(reason, f"NVML failed: {error}")[:512])


def _lost_reason(nvml: Any, error: Any) -> NodeReason:
    reasons = {
        nvml.NVML_ERROR_GPU_IS_LOST: NodeReason.GPU_LOST,
        nvml.NVML_ERROR_RESET_REQUIRED: NodeReason.RESET_REQUIRED,
        nvml.NVML_ERROR_NO_PERMISSION: NodeReason.NO_PERMISSION,
    }
    return reasons.get(error.value, NodeReason.DEVICE_FAILED)


def _failed(reason: NodeReason, message: str) -> Reading:
    return Reading(fault=Fault(reason=reason, message=message))
