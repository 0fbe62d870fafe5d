# SPDX-License-Identifier: Apache-2.0
"""Turns the global adapter into what other software reads."""

from .peft import write_adapter

__all__ = ["write_adapter"]
