# SPDX-License-Identifier: Apache-2.0
"""What all HTTP servers of the operator share: bounded connections, and refusals in one line."""

from .connection import connection_of
from .site import Limits, listen, serve

__all__ = ["Limits", "connection_of", "listen", "serve"]
