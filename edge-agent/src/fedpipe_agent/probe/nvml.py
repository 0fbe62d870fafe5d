"""GPU facts through NVML: init, read, shutdown on every pass, in a child process of its own.

A child, because NVML can hang inside the driver, can crash, and keeps the library it loaded first: after a
driver upgrade only a fresh process loads the new one. The parent never loads NVML and never starts a thread,
so forking it is safe and costs a few milliseconds.
"""

import contextlib
import ctypes
import gc
import os
import select
import signal
import time
from collections.abc import Callable
from typing import Any

from pydantic import Field, ValidationError

from fedpipe_api.base import Model
from fedpipe_api.node import Device, MigInstance, NodeReason

RESULT_LIMIT = 1024 * 1024
MAX_DEVICES = 64
PR_SET_PDEATHSIG = 1

Wait = Callable[[int, float], bool]
"""Waits until a file descriptor is readable, at most so many seconds; says whether it is."""


class Fault(Model):
    """Why NVML told nothing."""

    reason: NodeReason
    message: str = Field(max_length=512)


class Lost(Model):
    """A device that is counted but does not answer."""

    index: int
    uuid: str | None = None
    reason: NodeReason
    message: str = Field(max_length=512)


class Reading(Model):
    """One pass over NVML. A device whose board has no memory of its own has `total_memory` null."""

    driver_version: str | None = None
    cuda_version: str | None = None
    devices: tuple[Device, ...] = Field(default=(), max_length=MAX_DEVICES)
    processes: tuple[int | None, ...] = Field(
        default=(), max_length=MAX_DEVICES, description="Compute processes on each device."
    )
    lost: tuple[Lost, ...] = Field(default=(), max_length=MAX_DEVICES)
    fault: Fault | None = None


class Reader:
    """Reads NVML in a child process and gives up on it after `timeout` seconds."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._stuck: int | None = None

    def read(self, wait: Wait | None = None) -> Reading:
        """Return one reading; a hang, a crash or rubbish is a reading with a fault.

        `wait` lets the caller do other work meanwhile. While a killed child has not gone (a call stuck in the
        kernel cannot be killed) no second one is started, so hung children never pile up.
        """
        if self._stuck is not None and not _gone(self._stuck, 0.0):
            return _failed(
                NodeReason.NVML_TIMEOUT,
                "an NVML call hangs in the kernel since an earlier pass; reboot the node if it stays",
            )
        self._stuck = None
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            _run_child(send)
        os.close(send)
        try:
            data = _receive(receive, self._timeout, wait or _wait_readable)
        finally:
            os.close(receive)
        if data is None:
            os.kill(child, signal.SIGKILL)
            if not _gone(child, 0.2):
                self._stuck = child
            return _failed(NodeReason.NVML_TIMEOUT, f"NVML did not answer within {self._timeout:g} s")
        _, exit_status = os.waitpid(child, 0)
        if exit_status:
            code = os.waitstatus_to_exitcode(exit_status)
            how = f"of signal {-code}" if code < 0 else f"with exit code {code}"
            return _failed(NodeReason.NVML_FAILED, f"the process that reads NVML died {how}")
        try:
            return Reading.model_validate_json(data)
        except ValidationError as error:
            return _failed(NodeReason.NVML_FAILED, f"NVML answered nonsense: {error.errors()[0]['msg']}")


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
    devices: list[Device] = []
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


def _device(nvml: Any, handle: Any, uuid: str) -> Device:
    capability = _ask(nvml, nvml.nvmlDeviceGetCudaComputeCapability, handle)
    memory = _ask(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
    utilization = _ask(nvml, nvml.nvmlDeviceGetUtilizationRates, handle)
    power = _ask(nvml, nvml.nvmlDeviceGetEnforcedPowerLimit, handle)
    ecc = _ask(nvml, nvml.nvmlDeviceGetEccMode, handle)
    mig = _ask(nvml, nvml.nvmlDeviceGetMigMode, handle)
    return Device(
        uuid=uuid[:128],
        name=(_ask(nvml, nvml.nvmlDeviceGetName, handle) or "NVIDIA GPU")[:128],
        compute_capability=f"{capability[0]}.{capability[1]}" if capability else None,
        total_memory=memory.total if memory else None,
        free_memory=memory.free if memory else None,
        utilization=utilization.gpu if utilization else None,
        power_limit=None if power is None else power / 1000,
        ecc=bool(ecc[0]) if ecc else None,
        mig_enabled=bool(mig[0]) if mig else None,
        mig_instances=_instances(nvml, handle) if mig and mig[0] else (),
    )


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
    }
    return reasons.get(error.value, NodeReason.DEVICE_FAILED)


def _run_child(send: int) -> None:
    """Read NVML, write the reading to `send` and end the process; never returns."""
    code = 70
    # A collection would copy the parent's whole heap to free nothing.
    gc.disable()
    try:
        # Nobody else would end a hung child of a parent that was killed.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        # A hung child must hold none of the parent's sockets.
        os.closerange(3, send)
        os.closerange(send + 1, 2**20)
        try:
            reading = collect()
        except Exception as error:
            reading = _failed(NodeReason.NVML_FAILED, f"NVML could not be read: {error!r}"[:512])
        data = reading.to_json().encode()
        while data:
            data = data[os.write(send, data) :]
        code = 0
    finally:
        os._exit(code)


def _receive(receive: int, timeout: float, wait: Wait) -> bytes | None:
    """Return all bytes up to the end of the stream, or None when the time is over."""
    data = b""
    end = time.monotonic() + timeout
    while len(data) <= RESULT_LIMIT:
        if not wait(receive, max(0.0, end - time.monotonic())):
            return None
        part = os.read(receive, 65536)
        if not part:
            return data
        data += part
    return None


def _wait_readable(descriptor: int, seconds: float) -> bool:
    return bool(select.select([descriptor], [], [], seconds)[0])


def _gone(child: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while True:
        if os.waitpid(child, os.WNOHANG)[0]:
            return True
        if time.monotonic() >= end:
            return False
        time.sleep(0.005)


def _failed(reason: NodeReason, message: str) -> Reading:
    return Reading(fault=Fault(reason=reason, message=message))
