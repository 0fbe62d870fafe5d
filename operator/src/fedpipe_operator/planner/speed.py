# SPDX-License-Identifier: Apache-2.0
"""How long training takes (METHOD §2), in seconds; work is in floating-point operations."""

import math
from collections.abc import Mapping

from fedpipe_api import wire
from fedpipe_api.lora.format import adapter_bytes, trained_bytes
from fedpipe_api.precisions import Precision

from .calibration import Calibration
from .workload import Configuration, Workload, compute_bytes

CPU_RATE = 2.5e10
"""Nominal operations a second of one CPU thread in float32, where no kernel was timed."""
CHECK_OPERATIONS = 2 * 128 * 512 * 512
"""Of one product of the agent's kernel check; it times the forward and backward product at the precision and
a reference product in float32, on one thread."""
THREAD_EFFICIENCY = 0.9
"""Exponent of the speed-up by threads."""
CUDA_RATES = {
    "H200": (5e13, 3e14),
    "H100": (5e13, 3e14),
    "A100": (1.5e13, 1.2e14),
    "4090": (4e13, 8e13),
    "L40": (4e13, 1e14),
    "L4": (1.5e13, 4e13),
    "A10": (1.5e13, 5e13),
    "T4": (5e12, 5e12),
    "ORIN": (1.5e12, 5e12),
}
"""Operations a second sustained in training by a part of the GPU's name: float32, bfloat16. Nominal: only the
start of a calibration."""
CUDA_RATE = (5e12, 1e13)
"""Of other GPUs."""
LAYER_SECONDS = {"cpu": 1e-3, "cuda": 2.5e-3}
"""Per layer and micro-batch: launching kernels and Python."""
PRIVATE_SLOWDOWN = 1.6
"""Of steps with private gradients, at most; measured steps correct it."""
LINK_RATE = 12_500_000
"""Bytes a second of a link nobody measured (100 Mbit/s)."""


def rate(device: wire.DeviceFacts, precision: Precision) -> float:
    """Return the operations a second of the base at a precision, at the declared speed."""
    if device.kind == "cuda":
        name = device.name.upper()
        single, half = next((rates for part, rates in CUDA_RATES.items() if part in name), CUDA_RATE)
        sustained = half if compute_bytes(device, precision) == 2 else single
        return device.speed * sustained / precision.slowdown
    seconds = {kernel.precision: kernel.seconds for kernel in device.kernels if kernel.usable}
    timed = (kernel.float32_seconds for kernel in device.kernels if kernel.usable and kernel.float32_seconds)
    reference = seconds.get(Precision.FP32) or next(timed, 3 * CHECK_OPERATIONS / CPU_RATE)
    measured = seconds.get(precision)
    # Two products at the precision, beside the reference; never faster than four times float32.
    own = max((measured or reference) - reference / 3, reference / 6)
    threads = math.pow(device.threads, THREAD_EFFICIENCY)
    return device.speed * threads * 2 * CHECK_OPERATIONS / own


def slowness(device: wire.DeviceFacts, precision: Precision) -> float:
    """Return how many times longer than float32 a kernel took on a CPU; 1 if faster or not timed."""
    if precision is Precision.FP32:
        return 1.0
    found = next((kernel for kernel in device.kernels if kernel.precision is precision), None)
    if device.kind != "cpu" or found is None or not (found.seconds and found.float32_seconds):
        return 1.0
    # Both times hold the same reference product, a third of float32's.
    shared = found.float32_seconds / 3
    return max(1.0, (found.seconds - shared) / (found.float32_seconds - shared))


def step_time(
    work: Workload,
    device: wire.DeviceFacts,
    configuration: Configuration,
    ranks: Mapping[str, int],
    calibration: Calibration | None = None,
) -> float:
    """Return the predicted seconds of one optimizer step."""
    seconds = fixed_time(work, device, configuration) + sum(
        rank * rank_time(work, device, work.sides[name]) for name, rank in ranks.items()
    )
    return seconds * (calibration.seconds_factor if calibration else 1.0)


def fixed_time(work: Workload, device: wire.DeviceFacts, configuration: Configuration) -> float:
    """Return the seconds of one optimizer step at rank 0.

    Frozen weights get no gradient: two products forward and two backward per weight and token.
    """
    shape = work.shape
    tokens = work.batch * work.length
    weights = shape.active_parameters or shape.linear_parameters
    weights += shape.vocabulary * shape.hidden if shape.causal else 0
    attention = 3 * shape.layers * work.length * shape.hidden
    operations = tokens * 4 * (weights + attention)
    recomputed = 1.5 if configuration.checkpointing else 1.0
    pieces = math.ceil(work.batch / configuration.micro_batch)
    launching = pieces * shape.layers * LAYER_SECONDS[device.kind] / device.speed
    private = PRIVATE_SLOWDOWN if work.private else 1.0
    return private * recomputed * (operations / rate(device, configuration.precision) + launching)


def rank_time(work: Workload, device: wire.DeviceFacts, sides: int) -> float:
    """Return the seconds one more rank of such a matrix adds to an optimizer step (adapters are float32)."""
    operations = 6 * work.batch * work.length * sides
    return operations / rate(device, Precision.FP32)


def evaluation_time(
    work: Workload, device: wire.DeviceFacts, configuration: Configuration, samples: int
) -> float:
    """Return the seconds of evaluating so many samples: a third of training them."""
    return samples / work.batch * fixed_time(work, device, configuration) / 3


def download_bytes(work: Workload) -> int:
    """Return the bytes of the global adapter, at its full rank."""
    return adapter_bytes(work.selected, work.shape.head, work.download_rank, work.download)


def upload_bytes(work: Workload, ranks: Mapping[str, int]) -> int:
    """Return the bytes of an update: the factors trained, and the head."""
    return trained_bytes(work.selected, work.shape.head, ranks, work.upload)


def transfer_time(device: wire.DeviceFacts, size: int) -> float:
    """Return the seconds of moving so many bytes over the node's link."""
    return size / (device.link_rate or LINK_RATE)
