# SPDX-License-Identifier: Apache-2.0
"""Log lines that nobody can forge: whatever a text holds, it stays on its line."""

import logging
import re
from types import TracebackType

LINE_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that end a line, move a terminal's cursor, turn the order of what is shown, or are no text."""

Raised = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


def one_line(text: str) -> str:
    """Return the text with every such character as its Python escape: a newline as backslash and n."""
    return _CONTROL.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


class LineFormatter(logging.Formatter):
    """Formats a record as one line; a traceback's lines are indented, so that none looks like a record."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the base class's name
        """Return the line without a traceback."""
        return one_line(super().formatMessage(record))

    def formatException(self, ei: Raised) -> str:  # noqa: N802
        """Return the traceback, indented."""
        return _indented(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:  # noqa: N802
        """Return the stack, indented."""
        return _indented(super().formatStack(stack_info))


def _indented(text: str) -> str:
    return "\n".join(f"  {one_line(line)}" for line in text.split("\n"))
