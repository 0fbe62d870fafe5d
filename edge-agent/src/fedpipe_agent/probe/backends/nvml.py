# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's GPUs through NVML: init, read, shutdown on every pass."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedpipe_api.node import GpuDevice, MigInstance, NodeReason, Source

from ..reading import MAX_DEVICES, Fault, Lost, Reading

SOURCE: Source = "nvml"
NAME = "NVML"
TIMED_OUT, FAILED = NodeReason.NVML_TIMEOUT, NodeReason.NVML_FAILED


DRIVERS = ("proc/driver/nvidia", "dev/nvidiactl", "dev/dxg", "dev/nvgpu")
"""What the kernel shows of a loaded driver: of boards, of WSL, of a Jetson."""


def present(root: Path) -> bool:
    """Whether a board is on the bus or a driver is loaded."""
    return bool(_boards(root)) or any((root / path).exists() for path in DRIVERS)


def collect(root: Path) -> Reading:
    """Return one reading, with the boards on PCI: without the driver they are all that is known."""
    return _ask_driver().model_copy(update={"boards": _boards(root), "vendor": "NVIDIA"})


def _ask_driver() -> Reading:
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
