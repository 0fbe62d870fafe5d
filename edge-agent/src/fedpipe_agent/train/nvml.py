# SPDX-License-Identifier: Apache-2.0
"""What NVML says of the GPU that this process trains on: what torch does not know of it."""

import contextlib
import os
from typing import Any

import pynvml


class Gpu:
    """A GPU or MIG instance by its UUID as torch reports it, without NVML's prefix.

    `uuid` is NVML's; that of a whole GPU where NVML is missing or knows none.
    """

    def __init__(self, uuid: str):
        self.uuid, self._handle = _find(uuid)

    def free(self) -> int | None:
        """Return the free bytes, or None where NVML does not report them."""
        if self._handle is None:
            return None
        try:
            return int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).free)
        except pynvml.NVMLError:
            return None

    def context(self, free_before: int | None, reserved: int) -> int:
        """Return the bytes of this process's CUDA context; 0 where NVML does not report it.

        Args:
            free_before: what `free` said before the context was there. Its fall counts other processes too
                and serves only where NVML does not list this one, as in a container's PID namespace.
            reserved: bytes that torch's allocator holds.
        """
        held, free = self._held(), self.free()
        if held is None and free_before is not None and free is not None:
            held = free_before - free
        return max(0, (held or 0) - reserved)

    def _held(self) -> int | None:
        if self._handle is None:
            return None
        try:
            processes = pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        except pynvml.NVMLError:
            return None
        return next((process.usedGpuMemory for process in processes if process.pid == os.getpid()), None)


def _find(uuid: str) -> tuple[str, Any]:
    # CUDA 12 and later report an instance's UUID where MIG is on.
    names = [f"GPU-{uuid}", f"MIG-{uuid}"]
    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        for name in names:
            with contextlib.suppress(pynvml.NVMLError):
                return name, pynvml.nvmlDeviceGetHandleByUUID(name)
    return names[0], None
