# SPDX-License-Identifier: Apache-2.0
"""The sentences that people read in plans."""

from collections.abc import Iterable, Mapping

from fedpipe_api import wire
from fedpipe_api.precisions import Precision
from fedpipe_api.units import duration, memory

from .workload import Configuration

TIMES_DIGITS = 10
"""Factors below are shown with a decimal."""


def batch(micro_batch: int, accumulation: int) -> str:
    """Return micro-batch × accumulation as `4×8`, or `16` without accumulation."""
    return f"{micro_batch}×{accumulation}" if accumulation > 1 else str(micro_batch)


def ranks(chosen: Mapping[str, int]) -> str:
    """Return the range of ranks as `r 4–8`."""
    low, high = min(chosen.values()), max(chosen.values())
    return f"r {low}–{high}" if low < high else f"r {low}"


def configuration(chosen: Configuration, samples: int) -> str:
    """Return a configuration as `bf16, batch 8×2`."""
    text = f"{chosen.precision}, batch {batch(chosen.micro_batch, samples // chosen.micro_batch)}"
    return text + (", checkpointing" if chosen.checkpointing else "")


def no_room(needed: int, least: Configuration, rank: int, has: int) -> str:
    """Return why nothing fits into memory."""
    return f"needs {memory(needed)} at {least.precision} ×{least.micro_batch}, r {rank}; has {memory(has)}"


def no_time(
    step: float, other: float, least: Configuration, rank: int, *, limit: float, deadline: float
) -> str:
    """Return why not one step fits into a round."""
    return (
        f"needs {duration(step + other)} for one step at {least.precision} ×{least.micro_batch}, r {rank} "
        f"({duration(other)} of it transfer and evaluation); it may take {duration(limit)} "
        f"of the round's {duration(deadline)}"
    )


def no_precision(device: wire.DeviceFacts, model: wire.ModelShape, wanted: Iterable[Precision]) -> str:
    """Return why no precision can be used."""
    found = {kernel.precision: kernel.message or "does not work" for kernel in device.kernels}
    found |= {
        precision: _without_effect(precision, model) for precision in set(Precision) - set(model.precisions)
    }
    faults = [f"{precision}: {found.get(precision, 'the node does not report it')}" for precision in wanted]
    return f"no precision allowed by spec.quantization works there ({'; '.join(faults)})"[:1024]


def slow(precision: Precision, slowness: float) -> str:
    """Return what a slow precision costs."""
    factor = f"{slowness:.1f}" if slowness < TIMES_DIGITS else f"{slowness:.0f}"
    return f"{precision} is {factor} times slower than fp32 there"


def no_effect(wanted: Iterable[Precision], model: wire.ModelShape) -> str:
    """Return why a model can be had at no precision that the job allows."""
    settings = [precision.setting or precision.name for precision in model.precisions]
    why = "; ".join(dict.fromkeys(_without_effect(precision, model) for precision in wanted))
    return f"spec.quantization: {why}; set {', '.join(settings)} or auto, or give another spec.model"


def fewer_steps(asked: int, planned: int, deadline: float) -> str:
    """Return why a node does fewer local steps."""
    return f"{asked} local steps do not fit the deadline of {duration(deadline)}; it does {planned}"


def _without_effect(precision: Precision, model: wire.ModelShape) -> str:
    if len(model.precisions) == 1:
        return f"the model's weights are stored at {model.precisions[0]}"
    return f"a {model.architecture} model has no layer that {precision} would shrink"
