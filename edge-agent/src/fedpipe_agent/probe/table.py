# SPDX-License-Identifier: Apache-2.0
"""A FedPipeNode as text for people."""

from collections.abc import Iterator

from fedpipe_api import units
from fedpipe_api.node import Capacity, FedPipeNode, FedPipeNodeStatus, GpuDevice


def table(node: FedPipeNode, capacity: Capacity | None = None) -> str:
    """Return one line per fact, the label in the first column; `capacity` is the declared one, if any."""
    link_from = "declared" if capacity and capacity.link_rate else "from the coordinator"
    rows = [("node", node.metadata.name), *_rows(node.status or FedPipeNodeStatus(), link_from)]
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {_printable(text)}".rstrip() for label, text in rows)


def _printable(text: str) -> str:
    # Names come from drivers and files: none may move the cursor of a terminal or begin a line.
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def _rows(status: FedPipeNodeStatus, link_from: str) -> Iterator[tuple[str, str]]:
    versions = [f"driver {status.driver_version}"] if status.driver_version else []
    versions += [f"CUDA {status.cuda_version}"] if status.cuda_version else []
    yield "source", " · ".join([status.source, *versions])
    for index, device in enumerate(status.devices):
        yield f"device {index}", f"{device.name} · {device.uuid}"
        yield "", " · ".join(_facts(device))
        for instance in device.mig_instances:
            memory = _free_of(instance.free_memory, instance.total_memory)
            yield "", f"{instance.profile} · {memory} · {instance.uuid}"
    if status.cpu:
        yield "cpu", f"{status.cpu.cores} cores · {_free_of(status.cpu.free_memory, status.cpu.total_memory)}"
        if status.cpu.cache_disk_free is not None:
            yield "cache", f"{units.memory(status.cpu.cache_disk_free)} free on disk"
    if status.link_rate is not None:
        yield "link", f"{units.rate(status.link_rate)} {link_from}"
    for support in status.precisions:
        answer = "yes" if support.usable else "no"
        proof = "verified" if support.verified else "unverified"
        time = f", {support.seconds * 1000:.1f} ms" if support.seconds is not None else ""
        reason = f": {support.message}" if support.message else ""
        yield str(support.precision), f"{answer} ({proof}{time}){reason}"
    for condition in status.conditions:
        reason = f"{condition.reason}: {condition.message}" if condition.message else condition.reason
        yield condition.type, f"{condition.status} · {reason}"


def _facts(device: GpuDevice) -> Iterator[str]:
    if device.compute_capability:
        yield f"compute capability {device.compute_capability}"
    yield _free_of(device.free_memory, device.total_memory) + (" (unified)" if device.unified_memory else "")
    if device.utilization is not None:
        yield f"{device.utilization} % busy"
    if device.power_limit is not None:
        yield f"{device.power_limit:.0f} W"
    if device.ecc is not None:
        yield "ECC on" if device.ecc else "ECC off"
    if device.mig_enabled:
        yield f"MIG with {len(device.mig_instances)} instances"


def _free_of(free: int | None, total: int | None) -> str:
    if total is None:
        return "memory unknown"
    return f"{units.memory(total)}" if free is None else f"{units.memory(free)} of {units.memory(total)} free"
