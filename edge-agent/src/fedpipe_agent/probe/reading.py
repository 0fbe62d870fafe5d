# SPDX-License-Identifier: Apache-2.0
"""What the driver of some GPUs reports in one pass, and what a backend that asks it has to bring."""

from pathlib import Path
from typing import Protocol

from pydantic import Field

from fedpipe_api.base import Model
from fedpipe_api.node import GpuDevice, NodeReason, Source

MAX_DEVICES = 64

ABSENT = (NodeReason.DRIVER_MISSING, NodeReason.DRIVER_NOT_LOADED)
"""Faults that leave a node without a GPU but otherwise well."""


class Fault(Model):
    """Why a driver reported nothing."""

    reason: NodeReason
    message: str = Field(max_length=512)


class Lost(Model):
    """A device that is counted but does not answer."""

    index: int
    uuid: str | None = None
    reason: NodeReason
    message: str = Field(max_length=512)


class Reading(Model):
    """One pass over a backend.

    A device with `unified_memory` has none of its own; one that does not report its memory to this user has
    `total_memory` null.
    """

    source: Source = "cpu"
    driver_version: str | None = None
    cuda_version: str | None = None
    devices: tuple[GpuDevice, ...] = Field(default=(), max_length=MAX_DEVICES)
    processes: tuple[int | None, ...] = Field(
        default=(), max_length=MAX_DEVICES, description="Compute processes on each device."
    )
    lost: tuple[Lost, ...] = Field(default=(), max_length=MAX_DEVICES)
    fault: Fault | None = None
    boards: int = Field(default=0, description="GPUs of the vendor on PCI, with or without a driver.")
    vendor: str = Field(default="", max_length=64)
    message: str = Field(default="", max_length=512, description="Of a driver that answers.")

    @property
    def silent(self) -> bool:
        """Whether a GPU is there and none answers; then nothing can be said of what the node carries."""
        if self.fault is not None:
            return self.fault.reason not in ABSENT
        return bool(self.lost) and not self.devices


class Backend(Protocol):
    """A module of `backends`: the interface of one kind of driver."""

    SOURCE: Source
    """What it is in a node's status."""
    NAME: str
    """Of the interface, for people."""
    TIMED_OUT: NodeReason
    """The fault when it does not answer."""
    FAILED: NodeReason
    """The fault when it breaks."""

    def present(self, root: Path) -> bool:
        """Whether there is anything to ask: a board, or a driver that is loaded. Reads small files only."""

    def collect(self, root: Path) -> Reading:
        """Return one reading; it can hang or crash: it is called in a process of its own.

        root: where /proc and /sys are found.
        """
