# SPDX-License-Identifier: Apache-2.0
"""Jobs of the ledger that cannot be taken up: each is set aside with the reason, and the others run."""

import json
import re
from dataclasses import dataclass

from pydantic import ValidationError

from fedpipe_api.base import explain

from ..store import Entry
from .decide import assignment, decide
from .order import OutOfOrderError, check
from .records import ADAPTER, Record, Submitted
from .state import JobState, apply, blobs_in_use, submitted
from .status import status

_LAST_SECOND = 253402300799.0
"""The end of the year 9999, the last that a date can have."""

_NAME = re.compile("[a-z0-9.-]{1,253}")
_DIGESTS = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Quarantine:
    """Why a job of the ledger is not taken up; `key` is that of the record, the names as far as known."""

    namespace: str
    name: str
    key: str
    reason: str


class UnreadableError(Exception):
    """A record cannot be read or placed; the message names no value of it."""


def read(entry: Entry) -> Record:
    """Return the record of an entry of the ledger; raises UnreadableError."""
    if not entry.intact:
        raise UnreadableError("its checksum is not that of its bytes")
    return parse(entry.body, entry.key, entry.at)


def parse(body: str, key: str, at: float) -> Record:
    """Return the record written as JSON under the given key and time; raises UnreadableError."""
    if not 0 <= at <= _LAST_SECOND:
        raise UnreadableError("its time is impossible")
    try:
        record = ADAPTER.validate_json(body)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        text = "unknown kind of record" if fault["type"] == "union_tag_invalid" else explain(error)
        raise UnreadableError(text) from None
    if record.key != key:
        raise UnreadableError("it is stored under the key of another record")
    return record


def fold(state: JobState | None, uid: str, entry: Entry) -> JobState:
    """Return the state after one more entry; raises UnreadableError."""
    record = read(entry)
    if state is None:
        if not isinstance(record, Submitted):
            raise UnreadableError("the record of the job's submission is missing")
        return submitted(uid, record, entry.at)
    try:
        check(state, record)
        apply(state, record, entry.at)
    except OutOfOrderError as error:
        raise UnreadableError(str(error)) from None
    except Exception as error:
        raise UnreadableError(
            f"it does not fit what was recorded before it ({type(error).__name__})"
        ) from error
    return state


def check_usable(state: JobState, now: float) -> None:
    """Do once what is done with a job all the time; raises UnreadableError when that fails."""
    try:
        decide(state, now)
        status(state, None, {})
        blobs_in_use(state)
        for node in state.offered:
            assignment(state, node, now)
    except Exception as error:
        text = f"its records cannot be worked with ({type(error).__name__})"
        raise UnreadableError(text) from error


def digests_named(body: str) -> set[str]:
    """Return whatever may be the digest of a blob in a record that perhaps cannot be read."""
    return set(_DIGESTS.findall(body))


def names_in(body: str) -> tuple[str, str]:
    """Return namespace and name from a record of submission, as far as they can be made out."""
    try:
        found = json.loads(body)
        names = found["namespace"], found["name"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return "", ""
    return names if all(isinstance(name, str) and _NAME.fullmatch(name) for name in names) else ("", "")
