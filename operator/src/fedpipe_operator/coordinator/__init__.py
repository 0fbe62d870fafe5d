# SPDX-License-Identifier: Apache-2.0
"""The HTTP face of the engine that agents talk to."""

from .http import application
from .identity import Identify, Identity, Tokens

__all__ = ["Identify", "Identity", "Tokens", "application"]
