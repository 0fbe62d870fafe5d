# SPDX-License-Identifier: Apache-2.0
"""Turns the global adapter into what other software reads."""

from .gguf import write_gguf
from .peft import write_adapter

__all__ = ["write_adapter", "write_gguf"]
