# SPDX-License-Identifier: Apache-2.0
"""What all jobs have spent of the privacy of a node's data: a file of the node, which only grows.

Each line is one round's steps. They are on disk before the first of them is done, so that no restart, of
whatever part, makes them undone.
"""

import fcntl
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from pydantic import Field, ValidationError

from fedpipe_api.accounting import NOISE_LIMIT, Steps, epsilon
from fedpipe_api.base import Model, Moment, Name, Positive, explain
from fedpipe_api.policy import Forbidden, PrivacyBudget

FILE_LIMIT = 64 * 2**20
"""Bytes; some hundred thousand rounds."""


class Charge(Model):
    """One line: the steps of one round of a job."""

    job: Name
    noise_multiplier: float = Field(gt=0, le=NOISE_LIMIT)
    sampling_rate: float = Field(gt=0, le=1)
    steps: Positive
    at: Moment


def charge(budget: PrivacyBudget, job: str, steps: Steps) -> None:
    """Charge the budget with steps that are to be done; they are durable when this returns.

    Raises:
        Forbidden: they would exceed the budget, or the ledger cannot be read and written.
    """
    # Checked as it is read: a line of another kind would close the ledger for good.
    line = Charge(job=job, **steps._asdict(), at=time.time())
    with _locked(budget) as file:
        spent, size = _read(budget, file)
        spent[steps.noise_multiplier, steps.sampling_rate] += steps.steps
        _check(budget, spent)
        # What a crash left of a line was never on disk in whole, and its steps never done.
        file.truncate(size)
        file.seek(size)
        file.write(line.to_json().encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def check(budget: PrivacyBudget) -> None:
    """Raise Forbidden where the ledger cannot be used, or more than the budget is already spent."""
    with _locked(budget) as file:
        _check(budget, _read(budget, file)[0])


def _check(budget: PrivacyBudget, spent: Counter[tuple[float, float]]) -> None:
    after = epsilon((Steps(*key, steps) for key, steps in sorted(spent.items())), budget.delta)
    if not after <= budget.epsilon:  # so that NaN, too, is too much
        raise Forbidden(
            f"{budget.file}: epsilon {after:.4g} would be spent over all jobs, of at most {budget.epsilon:g}"
        )


@contextmanager
def _locked(budget: PrivacyBudget) -> Iterator[BinaryIO]:
    """Yield the ledger's file, to read and write, which no other agent of the node has meanwhile.

    It is never created here: a new one, on an empty volume, would have everything unspent.
    """
    try:
        with open(budget.file, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
    except FileNotFoundError:
        raise Forbidden(
            f"{budget.file}: no such file; its owner creates it once, empty and writable for agents"
        ) from None
    except OSError as error:
        raise Forbidden(f"{budget.file}: {error.strerror}; the privacy spent cannot be counted") from None


def _read(budget: PrivacyBudget, file: BinaryIO) -> tuple[Counter[tuple[float, float]], int]:
    """Return the steps by noise multiplier and sampling rate, and the bytes of the whole lines."""
    data = file.read(FILE_LIMIT + 1)
    if len(data) > FILE_LIMIT:
        raise Forbidden(f"{budget.file}: larger than {FILE_LIMIT >> 20} MiB; this is no privacy ledger")
    spent: Counter[tuple[float, float]] = Counter()
    size = data.rfind(b"\n") + 1
    for number, line in enumerate(data[:size].splitlines(), 1):
        try:
            one = Charge.model_validate_json(line)
        except ValidationError as error:
            raise Forbidden(f"{budget.file}:{number}: {explain(error)}; restore the ledger") from None
        spent[one.noise_multiplier, one.sampling_rate] += one.steps
    return spent, size
