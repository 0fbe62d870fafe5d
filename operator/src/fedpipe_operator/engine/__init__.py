# SPDX-License-Identifier: Apache-2.0
"""The engine: owns rounds. A pure state machine over a durable ledger, driven by one task per job."""

from .accept import Refused
from .engine import Engine
from .events import JobEvent

__all__ = ["Engine", "JobEvent", "Refused"]
