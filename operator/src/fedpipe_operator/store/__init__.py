# SPDX-License-Identifier: Apache-2.0
"""What must survive: an append-only SQLite ledger and content-addressed blobs."""

from .blobs import Blobs, Incoming
from .full import is_full
from .ledger import Duplicate, Entry, Ledger

__all__ = ["Blobs", "Duplicate", "Entry", "Incoming", "Ledger", "is_full"]
