# SPDX-License-Identifier: Apache-2.0
"""The planner: from a job, a model's shape and the nodes' facts to what each node carries, and why. Pure."""

from .calibration import Calibration
from .fleet_plan import asked_steps, calibrate, plan
from .private_noise import steps_of, with_noise
from .replan import limit_after_kill, needs_replan
from .request import NodeFacts, Plan, PlanRequest
from .selection import select_matrices
from .table import PlanRow, modules_line, rows, slow_line, summary_line

__all__ = [
    "Calibration",
    "NodeFacts",
    "Plan",
    "PlanRequest",
    "PlanRow",
    "asked_steps",
    "calibrate",
    "limit_after_kill",
    "modules_line",
    "needs_replan",
    "plan",
    "rows",
    "select_matrices",
    "slow_line",
    "steps_of",
    "summary_line",
    "with_noise",
]
