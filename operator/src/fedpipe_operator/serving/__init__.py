"""What all HTTP servers of the operator share: bounded connections, and refusals in one line."""

from .guard import guard
from .site import Connection, Limits, connection_of, serve

__all__ = ["Connection", "Limits", "connection_of", "guard", "serve"]
