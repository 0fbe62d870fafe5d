# SPDX-License-Identifier: Apache-2.0
"""How often a node may register and return, and a job be edited."""

import time

from .accept import Refused


class Allowance:
    """How many records a node may cause by coming and going: `BURST` at once, then one each `SECONDS`.

    The ledger keeps each of them for the job's life, so a node that fails and returns in a loop may not set
    their number.
    """

    BURST = 100
    SECONDS = 30.0

    def __init__(self) -> None:
        self._used: dict[str, tuple[float, float]] = {}  # records not yet made up for, and as of when

    def take(self, node: str) -> bool:
        """Return whether the node may cause one more record now, and count it."""
        now = time.monotonic()
        used, since = self._used.get(node, (0.0, now))
        used = max(0.0, used - (now - since) / self.SECONDS)
        allowed = used + 1 <= self.BURST
        self._used[node] = (used + allowed, now)
        return allowed


class Registrations(Allowance):
    """How many registrations of a node are read, whether or not they cause a record: each may take long."""

    SECONDS = 10.0


class Edits(Allowance):
    """How many edits of a spec are recorded: each record holds the whole spec, up to a megabyte."""

    BURST = 50
    SECONDS = 300.0


def require_allowed(allowance: Allowance, node: str) -> None:
    """Refuse a node that registers too often; it is welcome again after a pause."""
    if not allowance.take(node):
        text = f"{node} registers too often; it is taken in again after a pause"
        raise Refused(429, "TooManyRegistrations", text, retry_after=round(allowance.SECONDS))
