"""What must survive: an append-only SQLite ledger and content-addressed blobs."""

from .blobs import Blobs, Incoming
from .ledger import Duplicate, Entry, Ledger

__all__ = ["Blobs", "Duplicate", "Entry", "Incoming", "Ledger"]
