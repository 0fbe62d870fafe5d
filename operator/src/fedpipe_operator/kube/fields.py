# SPDX-License-Identifier: Apache-2.0
"""Reads objects of the cluster, whatever is written in them: a field has its type or is named."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

MOST = 2**63 - 1
"""Integers of Kubernetes have 64 bits."""


class Unreadable(ValueError):
    """A field is not as its kind has it. The text names the field, never its value."""


class FieldReader:
    """One JSON object. Null stands for a field that is not there, as in Kubernetes; faults are Unreadable."""

    def __init__(self, found: Mapping[str, Any], path: str = "") -> None:
        self._found = found
        self._path = path

    def __contains__(self, key: str) -> bool:
        """Return whether the field is there."""
        return self._found.get(key) is not None

    def fault(self, key: str, wanted: str) -> Unreadable:
        """Return the error for a field that is not what is wanted."""
        return Unreadable(f"{self._path}{key}: must be {wanted}")

    def object(self, key: str) -> "FieldReader":
        """Return an object, empty if it is not there."""
        found = self._found.get(key)
        if found is None:
            found = {}
        if not isinstance(found, Mapping):
            raise self.fault(key, "an object")
        return FieldReader(found, f"{self._path}{key}.")

    def objects(self, key: str) -> list["FieldReader"]:
        """Return a list of objects, empty if it is not there."""
        found = self._found.get(key)
        if found is None:
            return []
        if not isinstance(found, Sequence) or not all(isinstance(item, Mapping) for item in found):
            raise self.fault(key, "a list of objects")
        return [FieldReader(item, f"{self._path}{key}[{number}].") for number, item in enumerate(found)]

    def text(self, key: str, *, longest: int = MOST) -> str:
        """Return a text, empty if it is not there."""
        found = self._found.get(key)
        if found is None:
            return ""
        if not _is_text(found) or len(found) > longest:
            raise self.fault(key, "a text" if longest == MOST else f"a text of at most {longest} characters")
        return str(found)

    def name(self, key: str) -> str:
        """Return a name or uid, which is never empty and never longer than Kubernetes has them."""
        found = self.text(key, longest=253)
        if not found:
            raise self.fault(key, "given")
        return found

    def texts(self, key: str) -> dict[str, str]:
        """Return a map of texts, such as labels; empty if it is not there."""
        found = self._found.get(key)
        if found is None:
            return {}
        if not isinstance(found, Mapping) or not all(map(_is_text, (*found, *found.values()))):
            raise self.fault(key, "a map of texts")
        return dict(found)

    def flag(self, key: str) -> bool:
        """Return a truth value, False if it is not there."""
        found = self._found.get(key)
        if found is not None and not isinstance(found, bool):
            raise self.fault(key, "true or false")
        return bool(found)

    def count(self, key: str) -> int:
        """Return a number of at least 0, 0 if it is not there."""
        found = self._found.get(key)
        if found is None:
            return 0
        # A large integer may come back from the API server as 1e+18.
        whole = isinstance(found, int) or (isinstance(found, float) and found.is_integer())
        if isinstance(found, bool) or not whole or not 0 <= found <= MOST:
            raise self.fault(key, "a number from 0 to 2^63 - 1")
        return int(found)

    def time(self, key: str) -> float | None:
        """Return the seconds since the epoch of a date, None if it is not there."""
        found = self._found.get(key)
        if found is None:
            return None
        try:
            moment = datetime.fromisoformat(found)
            return moment.timestamp() if moment.tzinfo else None
        except (TypeError, ValueError, OverflowError):
            raise self.fault(key, "a date of the years 1 to 9999, such as 2027-01-01T00:00:00Z") from None


def _is_text(value: object) -> bool:
    # JSON can write half of a surrogate pair, which no encoding takes.
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def one_line(text: str, longest: int = 400) -> str:
    """Return a text of somebody else so that it fits a log line or a status: one line, printable, its end."""
    lines = text.strip().splitlines()
    last = lines[-1][-longest:] if lines else ""
    return "".join(character if character.isprintable() else " " for character in last)
