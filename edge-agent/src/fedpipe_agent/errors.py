# SPDX-License-Identifier: Apache-2.0
"""The ways the agent's work ends early, and what may be said of an error outside the node.

A user's mistake is `fedpipe_api.base.UserError`. An exception of a library may quote a row of the node's
data in its text, so only the text of our own exceptions leaves the process: of any other, its type and place.
"""

import os
import traceback
from pathlib import Path
from types import TracebackType

from fedpipe_api.base import UserError

_ROOT = Path(__file__).parent.parent
_OURS = "fedpipe_agent"


class Stopped(BaseException):
    """SIGTERM or SIGINT arrived: leave quickly, exit 0. Not an Exception, so that no handler swallows it."""


class Aborted(Exception):
    """The coordinator no longer wants the present work: its round is closed."""


class RequestRefused(Exception):
    """The coordinator answered 4xx."""

    def __init__(self, status: int, reason: str, error: str):
        super().__init__(f"coordinator refused ({status} {reason}): {error}")
        self.status = status
        self.reason = reason


class Failure(Exception):
    """A failure that one line explains: the agent reports it and exits 1 without a traceback."""


def describe(error: BaseException) -> str:
    """Return the one line that may leave the node: the text of our own exceptions, else type and place.

    Of an operating system's error its number is added in words: `OSError (No space left on device) at …`.
    """
    if isinstance(error, UserError | Failure | RequestRefused):
        return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    what = type(error).__name__
    if isinstance(error, OSError) and isinstance(error.errno, int):
        what += f" ({os.strerror(error.errno)})"
    return f"{what} at {_place(error.__traceback__)}"


def trace(error: BaseException) -> str:
    """Return the traceback of an error and of those that led to it, without their texts."""
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    before = f"{trace(cause)}which led to:\n" if cause else ""
    frames = "".join(traceback.format_tb(error.__traceback__))
    return f"{before}Traceback (most recent call last):\n{frames}{describe(error)}\n"


def _place(frames: TracebackType | None) -> str:
    """Return `file:line` of the innermost frame in this package, or of the innermost of all."""
    found = [(Path(frame.f_code.co_filename), line) for frame, line in traceback.walk_tb(frames)]
    ours = [(path, line) for path, line in found if path.is_relative_to(_ROOT / _OURS)]
    if ours:
        path, line = ours[-1]
        return f"{path.relative_to(_ROOT)}:{line}"
    return f"{found[-1][0].name}:{found[-1][1]}" if found else "an unknown place"
