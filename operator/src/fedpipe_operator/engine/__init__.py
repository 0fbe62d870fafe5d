"""The engine: owns rounds. A pure state machine over a durable ledger, driven by one task per job."""

from .accept import Refused
from .notes import Note
from .rounds import Engine
from .status import status

__all__ = ["Engine", "Note", "Refused", "status"]
