# SPDX-License-Identifier: Apache-2.0
"""Who is asking: a bearer token stands for exactly one (job, node)."""

import hmac
import secrets
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Identity:
    """One agent: the job's uid and the node's name."""

    job: str
    node: str


class Identify(Protocol):
    """Turns a bearer token into an identity, or into None with a reason logged."""

    async def __call__(self, token: str) -> Identity | None:
        """Return who presents the token."""
        ...


class Tokens:
    """Random tokens of one run: the identity of local agents."""

    def __init__(self) -> None:
        self._known: dict[str, Identity] = {}

    def issue(self, identity: Identity) -> str:
        """Return a new token for an agent."""
        token = secrets.token_urlsafe(32)
        self._known[token] = identity
        return token

    async def __call__(self, token: str) -> Identity | None:
        """Return who presents the token; every token is compared in constant time."""
        found = None
        for known, identity in self._known.items():
            if hmac.compare_digest(known.encode(), token.encode()):
                found = identity
        return found
