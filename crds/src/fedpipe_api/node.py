# SPDX-License-Identifier: Apache-2.0
"""FedPipeNode: what one edge node can carry, as its probe reports it (`fedpipe.io/v1alpha1`)."""

from datetime import datetime
from enum import StrEnum
from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from .base import Model, Name, Quantity, keyed
from .conditions import Advice, Condition
from .objects import LabelValue, ObjectMeta
from .precisions import Precision

HEARTBEAT_SECONDS = 120.0
"""A probe reports at least this often, even when nothing has changed."""

STALE_SECONDS = 3 * HEARTBEAT_SECONDS
"""A report older than this makes its node ineligible."""

READY = "Ready"
DRIVER_FAULT = "DriverFault"
DEVICE_LOST = "DeviceLost"
MEMORY_PRESSURE = "MemoryPressure"
"""Types of a FedPipeNode's conditions; all but Ready are problems, True when there is one."""


class NodeReason(StrEnum):
    """Every reason a condition of a FedPipeNode can carry."""

    GPU_READY = "GpuReady"
    CPU_ONLY = "CpuOnly"
    DECLARED = "Declared"
    NO_MIG_INSTANCES = "NoMigInstances"
    NO_GPU = "NoGpu"
    DRIVER_LOADED = "DriverLoaded"
    DRIVER_MISSING = "DriverMissing"
    DRIVER_NOT_LOADED = "DriverNotLoaded"
    DRIVER_MISMATCH = "DriverMismatch"
    NO_PERMISSION = "NoPermission"
    NVML_TIMEOUT = "NvmlTimeout"
    NVML_FAILED = "NvmlFailed"
    ALL_ANSWER = "AllDevicesAnswer"
    GPU_LOST = "GpuIsLost"
    RESET_REQUIRED = "ResetRequired"
    DEVICE_FAILED = "DeviceFailed"
    MEMORY_FREE = "MemoryFree"
    MEMORY_IN_USE = "MemoryInUse"
    MEMORY_SHARED = "MemoryShared"
    PROBE_UNINSTALLED = "ProbeUninstalled"


NODE_ADVICE: dict[NodeReason, Advice] = {
    NodeReason.GPU_READY: Advice("GPUs answer and may be used."),
    NodeReason.CPU_ONLY: Advice("There is no usable GPU; jobs run on the processor."),
    NodeReason.DECLARED: Advice("The capacity is declared in a file instead of measured."),
    NodeReason.NO_MIG_INSTANCES: Advice(
        "MIG is enabled but has no instances, so the GPU offers nothing.",
        "Create instances with `nvidia-smi mig -cgi`, or switch MIG off.",
    ),
    NodeReason.NO_GPU: Advice("No NVIDIA board is plugged in, so no driver is needed."),
    NodeReason.DRIVER_LOADED: Advice("The driver answers."),
    NodeReason.DRIVER_MISSING: Advice(
        "There is a board, but the NVIDIA library is not found.",
        "Install the driver, or give the probe Pod the NVIDIA runtime class.",
    ),
    NodeReason.DRIVER_NOT_LOADED: Advice(
        "The library is there, but the kernel driver is not loaded.",
        "Load it with `modprobe nvidia`; after a kernel upgrade, rebuild the driver.",
    ),
    NodeReason.DRIVER_MISMATCH: Advice(
        "Library and kernel driver are of different versions, as after an upgrade.",
        "Reboot the node or reload the driver.",
    ),
    NodeReason.NO_PERMISSION: Advice(
        "NVML refuses the probe's user.", "Give the probe access to the GPU devices."
    ),
    NodeReason.NVML_TIMEOUT: Advice(
        "NVML does not answer, as with a hanging driver.",
        "Look for Xid errors in `dmesg` on the node; reboot it if they repeat.",
    ),
    NodeReason.NVML_FAILED: Advice(
        "NVML failed in another way; the message says how.", "Run `nvidia-smi` on the node."
    ),
    NodeReason.ALL_ANSWER: Advice("Every GPU of the node answers."),
    NodeReason.GPU_LOST: Advice(
        "A GPU fell off the bus.", "Look at its power and cooling, and reboot the node."
    ),
    NodeReason.RESET_REQUIRED: Advice(
        "A GPU must be reset before it works again.", "Drain the node and reset the GPU, or reboot."
    ),
    NodeReason.DEVICE_FAILED: Advice(
        "A GPU does not answer; the message says which.", "Run `nvidia-smi` on the node."
    ),
    NodeReason.MEMORY_FREE: Advice("GPU memory is free for jobs."),
    NodeReason.MEMORY_IN_USE: Advice(
        "Others hold much of the GPU memory.", "Nothing, or stop them: jobs get what is free."
    ),
    NodeReason.MEMORY_SHARED: Advice(
        "Several processes compute on one GPU and hold much of its memory.",
        "Nothing, or stop them: jobs get what is free, and run slower.",
    ),
    NodeReason.PROBE_UNINSTALLED: Advice(
        "The chart was uninstalled; nobody looks at the node.",
        "Nothing, or delete the FedPipeNode; a new install reports it again.",
    ),
}
"""What each reason of a FedPipeNode means; the troubleshooting tables are written from it."""


class MigInstance(Model):
    """One MIG instance of a device."""

    uuid: str = Field(max_length=128, description="As NVML gives it.")
    profile: str = Field(max_length=64, description="For example 1g.5gb.")
    total_memory: int = Field(ge=0, description="Bytes.")
    free_memory: int | None = Field(default=None, ge=0, description="Bytes.")


class GpuDevice(Model):
    """One GPU, as NVML reports it; null where NVML says the board does not support the question."""

    uuid: str = Field(max_length=128, description="As NVML gives it.")
    name: str = Field(max_length=128, description="Product name.")
    compute_capability: str | None = Field(default=None, max_length=16, description="For example 8.6.")
    total_memory: int | None = Field(default=None, ge=0, description="Bytes.")
    free_memory: int | None = Field(default=None, ge=0, description="Bytes.")
    unified_memory: bool = Field(default=False, description="CPU and GPU share the memory (Jetson).")
    utilization: int | None = Field(default=None, ge=0, le=100, description="Percent.")
    power_limit: float | None = Field(default=None, ge=0, description="Watts.")
    ecc: bool | None = Field(default=None, description="Whether ECC is on.")
    mig_enabled: bool | None = Field(default=None, description="Whether MIG is on.")
    mig_instances: tuple[MigInstance, ...] = Field(
        default=(), max_length=64, json_schema_extra=keyed("uuid"), description="MIG instances, if any."
    )


class Cpu(Model):
    """The node's processor, memory and disk."""

    cores: int = Field(ge=1, description="Logical cores.")
    total_memory: int = Field(ge=0, description="Bytes.")
    free_memory: int = Field(ge=0, description="Bytes available without swapping.")
    cache_disk_free: int | None = Field(default=None, ge=0, description="Bytes free for the model cache.")


class PrecisionSupport(Model):
    """One precision of the frozen base that the node offers."""

    precision: Precision
    verified: bool = Field(default=False, description="A real kernel ran; else derived from the device.")
    seconds: float | None = Field(default=None, ge=0, description="Time of the verifying kernel.")
    float32_seconds: float | None = Field(
        default=None, ge=0, description="Of the same kernel in float32, timed beside it."
    )
    message: str | None = Field(default=None, max_length=1024, description="Why it cannot be used.")
    usable: bool = Field(
        default=True, description="Whether it works here. A planner goes by the agent's own kernels."
    )


class FedPipeNodeSpec(Model):
    """What a person may decide about a node."""

    unschedulable: bool = Field(default=False, description="No job may use this node.")


Source = Literal["nvml", "tegra", "cpu", "declared"]


class FedPipeNodeStatus(Model):
    """What the probe saw."""

    source: Source = Field(
        default="cpu", description="Where the facts come from; tegra is a Jetson without NVML."
    )
    driver_version: str | None = Field(default=None, max_length=64, description="Of the NVIDIA driver.")
    cuda_version: str | None = Field(default=None, max_length=64, description="That the driver supports.")
    devices: tuple[GpuDevice, ...] = Field(
        default=(), max_length=64, json_schema_extra=keyed("uuid"), description="GPUs; none is a CPU node."
    )
    cpu: Cpu | None = None
    precisions: tuple[PrecisionSupport, ...] = Field(
        default=(),
        max_length=8,
        json_schema_extra=keyed("precision"),
        description="Precisions of the frozen base.",
    )
    link_rate: int | None = Field(default=None, ge=0, description="Bytes per second to the coordinator.")
    observed_at: datetime | None = Field(default=None, description="When the probe last looked.")
    device_summary: str = Field(default="", max_length=128, description="For the printer column.")
    memory_summary: str = Field(default="", max_length=32, description="For the printer column.")
    free_summary: str = Field(default="", max_length=32, description="For the printer column.")
    precision_summary: str = Field(default="", max_length=64, description="For the printer column.")
    conditions: tuple[Condition, ...] = Field(
        default=(), max_length=16, json_schema_extra=keyed("type"), description="Latest observations."
    )


class FedPipeNode(Model):
    """One node's capacity; cluster-scoped, named as the Node and owned by it."""

    api_version: Literal["fedpipe.io/v1alpha1"] = "fedpipe.io/v1alpha1"
    kind: Literal["FedPipeNode"] = "FedPipeNode"
    metadata: ObjectMeta
    spec: FedPipeNodeSpec = FedPipeNodeSpec()
    status: FedPipeNodeStatus | None = None


MEMORY_LEAST = 64 * 2**20
"""Bytes of the least memory that may be declared: an agent alone takes several times as many."""


class Capacity(Model):
    """A declared capacity: what a node counts as, whatever hardware it has.

    The agent keeps to it: it never plans past `memory`, uses `threads` CPU threads, stretches every step to
    1/`speed` of its time, and paces transfers to `link_rate`.
    """

    device: str = Field(default="cpu", min_length=1, max_length=128, description="Name to show.")
    memory: Quantity | None = Field(default=None, le=2**53, description="Bytes the agent may use in all.")
    threads: int | None = Field(default=None, ge=1, le=1024, description="CPU threads; default: all.")
    speed: float = Field(default=1.0, ge=1e-6, le=1, description="Share of this machine's speed.")
    link_rate: Quantity | None = Field(default=None, le=2**53, description="Bytes per second, each way.")
    precisions: tuple[Precision, ...] = Field(
        default=tuple(Precision), min_length=1, max_length=8, description="That the planner may choose."
    )

    @model_validator(mode="after")
    def _has_room(self) -> Self:
        if self.link_rate == 0:
            raise _wrong("linkRate", "must be above 0")
        if self.memory is not None and self.memory < MEMORY_LEAST:
            raise _wrong("memory", f"must be at least {MEMORY_LEAST >> 20}Mi; write it like 600Mi or 16Gi")
        return self


def _wrong(field: str, message: str) -> PydanticCustomError:
    return PydanticCustomError("rule", "{message}", {"field": field, "message": message})


class FleetNode(Capacity):
    """One node of a fleet file: its capacity, its labels and where its data is stored."""

    name: Name = Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", description="Unique in the fleet.")
    labels: dict[str, LabelValue] = Field(
        default_factory=dict, max_length=100, description="Its node labels."
    )
    data: str | None = Field(
        default=None, min_length=1, max_length=4096, description="Directory of its data."
    )
    policy: str | None = Field(
        default=None, min_length=1, max_length=4096, description="FedPipePolicy of its owner, a file."
    )


class Fleet(Model):
    """Nodes played by processes of one machine, for `fedpipe run` and `fedpipe plan`."""

    model: str | None = Field(
        default=None, min_length=1, max_length=4096, description="Local copy of the job's model."
    )
    nodes: tuple[FleetNode, ...] = Field(min_length=1, max_length=5000, description="The nodes.")

    @model_validator(mode="after")
    def _unique(self) -> Self:
        names = [node.name for node in self.nodes]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ValueError(f"nodes: {twice} is given twice")
        return self
