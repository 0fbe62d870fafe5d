# SPDX-License-Identifier: Apache-2.0
"""One row of a data file, and what happens to one that cannot be read."""

import csv
import json
from collections.abc import Callable
from typing import Any, NamedTuple

from ..base import UserError

BadRow = Callable[[UserError], None]
"""Called with what is wrong with one row; returns where the others are to be read."""


class Row(NamedTuple):
    """One row.

    `place` is `file:line`, `file:row` of a table; `source` the line of JSON without its end, the cells of
    CSV, None of a table or an array.
    """

    place: str
    fields: dict[str, Any]
    source: str | list[str] | None


def fail(error: UserError) -> None:
    """Raise what is wrong with a row."""
    raise error


def fault_of(error: Exception) -> str:
    """Return what is wrong with a line, without the words of the error: they quote bytes of the data."""
    match error:
        case json.JSONDecodeError():
            return f"its syntax is wrong at column {error.colno}"
        case RecursionError():
            return "it is nested too deep"
        case csv.Error() if "field limit" in str(error):
            return f"a field is longer than {csv.field_size_limit()} characters"
        case csv.Error():
            return "its quotes or line ends are wrong"
    return "a number is too long"
