# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C where there is something to clean up; elsewhere it ends the command at once (see `entry`)."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def clean_interrupt() -> Iterator[None]:
    """Have Ctrl-C raise KeyboardInterrupt in the block, which then cleans up."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
