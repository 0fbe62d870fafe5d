"""The engine: owns rounds. A pure state machine over a durable ledger, driven by one task per job."""

from .accept import Refused
from .engine import Engine
from .notes import Note

__all__ = ["Engine", "Note", "Refused"]
