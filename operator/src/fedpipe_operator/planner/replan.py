# SPDX-License-Identifier: Apache-2.0
"""When a plan no longer meets the node it was made for."""

import math

from fedpipe_api import units, wire

SLOWER, FASTER = 1.3, 0.6
"""Measured over predicted step time at which a plan is made again. The band is wide, and a new plan predicts
with the measured time, so that noise does not change plans back and forth."""
KILLED_SHARE = 0.8
"""Of the bytes that were planned for an agent that was killed for memory, those it is planned with again."""
PEAK = 1.1
"""Measured over predicted peak memory: beyond the headroom that plans leave."""


def limit_after_kill(planned_bytes: int) -> int:
    """Return the bytes that a node may be planned with once an agent with so many planned ones was killed."""
    return math.floor(KILLED_SHARE * planned_bytes)


def needs_replan(
    previous: wire.NodePlan,
    step_seconds: float | None = None,
    peak_bytes: int | None = None,
    free_memory: int | None = None,
) -> str | None:
    """Return why the plan should be replaced, or None.

    Args:
        previous: the plan in use.
        step_seconds: measured seconds of an optimizer step.
        peak_bytes: measured peak, runtime included.
        free_memory: bytes the agent may use now, runtime included.
    """
    if free_memory is not None and free_memory < max(previous.predicted_bytes, peak_bytes or 0):
        needed = max(previous.predicted_bytes, peak_bytes or 0)
        return f"{units.memory(free_memory)} are free; the plan needs {units.memory(needed)}"
    if peak_bytes is not None and peak_bytes > PEAK * previous.predicted_bytes:
        return (
            f"peak memory is {units.memory(peak_bytes)}, predicted {units.memory(previous.predicted_bytes)}"
        )
    if step_seconds is not None and previous.predicted_step_seconds > 0:
        ratio = step_seconds / previous.predicted_step_seconds
        if not FASTER <= ratio <= SLOWER:
            measured, predicted = map(units.duration, (step_seconds, previous.predicted_step_seconds))
            return f"a step takes {measured}, predicted {predicted}"
    return None
