# SPDX-License-Identifier: Apache-2.0
"""The device the agent trains on, as it really is and as its declared capacity has it.

Memory is counted for the whole process, runtime included: resident bytes on CPU, allocator and context on
CUDA.
"""

import ctypes
import gc
import os
import platform
import time
from pathlib import Path

import torch

from fedpipe_api import host_memory, wire
from fedpipe_api.node import Capacity

from .nvml import Gpu

RESERVE = 150 * 2**20
"""Bytes kept for what CUDA takes outside torch's allocator after its context: modules loaded at first use,
handles of cuBLAS. Nominal: to be measured on the first GPU."""

KERNELS_KEPT = "20"
"""Compiled kernels that oneDNN, and torch's cache over it, keep: those of one layer at one length. More of
them hold pages of the heap back; with fewer they are compiled again in every layer. Read at first use."""

_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "bad alloc",
    "cublas_status_alloc_failed",
)


class Device:
    """A CPU or the first visible CUDA device, kept to a declared capacity."""

    def __init__(self, capacity: Capacity, link_rate: int | None = None):
        """Open the device; on CUDA this creates the context, whose size is part of `overhead`.

        link_rate: bytes per second as measured; used where the capacity declares none.
        """
        self._capacity = capacity
        self.threads = capacity.threads or len(os.sched_getaffinity(0))
        torch.set_num_threads(self.threads)
        self.torch = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        if not self.cuda:
            # oneDNN compiles its bfloat16 kernels for each length of a batch, and would keep a thousand.
            for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
                os.environ.setdefault(cache, KERNELS_KEPT)
        self._gpu = Gpu(str(torch.cuda.get_device_properties(self.torch).uuid)) if self.cuda else None
        self._context = _create_context(self.torch, self._gpu) if self._gpu else 0
        self.budget = capacity.memory
        self.link_rate = capacity.link_rate or link_rate
        if self.cuda and self.budget is not None:
            total = torch.cuda.get_device_properties(self.torch).total_memory
            share = min(1.0, max(self.budget - self._context - RESERVE, 1) / total)
            torch.cuda.set_per_process_memory_fraction(share, self.torch)

    @property
    def cuda(self) -> bool:
        """Whether this is a CUDA device."""
        return self.torch.type == "cuda"

    def facts(self, kernels: tuple[wire.KernelResult, ...]) -> wire.DeviceFacts:
        """Return the device's facts for the planner."""
        overhead = self.used()
        name, uuid, capability = self._capacity.device, None, None
        if self._gpu:
            properties = torch.cuda.get_device_properties(self.torch)
            uuid, capability = self._gpu.uuid, f"{properties.major}.{properties.minor}"
            # Not the declared name: the planner derives the speed from it.
            name = properties.name
            held = self._context + torch.cuda.memory_reserved(self.torch)
            free = held + torch.cuda.mem_get_info(self.torch)[0]
        else:
            name = platform.processor() or "cpu" if name == "cpu" else name
            free = overhead + host_memory.read().free
        return wire.DeviceFacts(
            kind=self.torch.type,
            name=name[:128],
            uuid=uuid,
            compute_capability=capability,
            free_memory=free if self.budget is None else min(free, self.budget),
            overhead=overhead,
            threads=self.threads,
            speed=self._capacity.speed,
            link_rate=self.link_rate,
            kernels=kernels,
        )

    def used(self) -> int:
        """Return the bytes in use now; on CUDA `RESERVE` counts as used."""
        if self.cuda:
            return self._context + RESERVE + torch.cuda.memory_allocated(self.torch)
        return _status("VmRSS")

    def peak(self) -> int:
        """Return the most bytes in use since `reset_peak`."""
        if self.cuda:
            return self._context + RESERVE + torch.cuda.max_memory_allocated(self.torch)
        return _status("VmHWM")

    def reset_peak(self) -> None:
        """Give unused memory back and start measuring the peak again."""
        gc.collect()
        self.give_back()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.torch)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            return  # a sandbox without it: the peak is that of the process's whole life

    def give_back(self) -> None:
        """Give memory that nothing uses back to the system."""
        if self.cuda:
            torch.cuda.empty_cache()
            return
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc
        if trim is not None:
            trim(0)

    def over_budget(self) -> bool:
        """Whether the peak has passed the declared memory; CUDA's allocator refuses before that."""
        return not self.cuda and self.budget is not None and self.peak() > self.budget

    def stretch(self, seconds: float) -> None:
        """Sleep so that work of `seconds` takes 1/speed of its time."""
        if self._capacity.speed < 1:
            time.sleep(seconds * (1 / self._capacity.speed - 1))


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is a failed allocation of any allocator."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _OUT_OF_MEMORY)


def _create_context(device: torch.device, gpu: Gpu) -> int:
    """Create the CUDA context and return its bytes."""
    before = gpu.free()
    torch.zeros(1, device=device)
    torch.cuda.synchronize(device)
    return gpu.context(before, torch.cuda.memory_reserved(device))


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0
