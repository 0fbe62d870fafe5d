"""The sentences and figures that people read in plans."""

from collections.abc import Iterable, Mapping

from fedpipe_api import wire
from fedpipe_api.job import Precision

from .workload import Configuration


def size(count: int) -> str:
    """Return bytes as `1.9 GiB` or `310 MiB`."""
    if count >= 1000 * 2**20:
        return f"{count / 2**30:.1f} GiB"
    return f"{count / 2**20:.0f} MiB"


def transfer(count: int) -> str:
    """Return transferred bytes in decimal units: `3.1 MB`."""
    if count >= 10**9:
        return f"{count / 10**9:.1f} GB"
    return f"{count / 10**6:.1f} MB" if count >= 10**5 else f"{count / 1000:.1f} kB"


def duration(seconds: float) -> str:
    """Return a duration as people say it: `850ms`, `9.5s`, `2m55s`, `1h03m`."""
    if seconds < 1:
        return f"{round(1000 * seconds)}ms"
    if seconds < 10:
        return f"{seconds:.1f}s".replace(".0s", "s")
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}m{rest:02}s" if rest else f"{minutes}m"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if minutes else f"{hours}h"


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
    return f"needs {size(needed)} at {least.precision} ×{least.micro_batch}, r {rank}; has {size(has)}"


def no_time(
    step: float, other: float, least: Configuration, rank: int, *, limit: float, deadline: float
) -> str:
    """Return why not one step fits into a round."""
    return (
        f"needs {duration(step + other)} for one step at {least.precision} ×{least.micro_batch}, r {rank} "
        f"({duration(other)} of it transfer and evaluation); it may take {duration(limit)} "
        f"of the round's {duration(deadline)}"
    )


def no_precision(device: wire.DeviceFacts, wanted: Iterable[Precision]) -> str:
    """Return why no precision can be used."""
    found = {kernel.precision: kernel.message or "does not work" for kernel in device.kernels}
    faults = [f"{precision}: {found.get(precision, 'the node does not report it')}" for precision in wanted]
    return f"no precision allowed by spec.quantization works there ({'; '.join(faults)})"[:1024]


def fewer_steps(asked: int, planned: int, deadline: float) -> str:
    """Return why a node does fewer local steps."""
    return f"{asked} local steps do not fit the deadline of {duration(deadline)}; it does {planned}"
