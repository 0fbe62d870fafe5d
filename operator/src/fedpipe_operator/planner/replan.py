# SPDX-License-Identifier: Apache-2.0
"""When a plan no longer meets the node it was made for."""

from fedpipe_api import units, wire

SLOWER, FASTER = 1.3, 0.6
"""Measured over predicted step time at which a plan is made again. The band is wide, and a new plan predicts
with the measured time, so that noise does not change plans back and forth."""
PEAK = 1.1
"""Measured over predicted peak memory: beyond the headroom that plans leave."""


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
