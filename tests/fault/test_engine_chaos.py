# SPDX-License-Identifier: Apache-2.0
"""A few of the random schedules of tests/bench/chaos.py, half of them with SIGKILLs."""

import importlib
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.mark.slow
def test_random_faults_lose_and_double_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    chaos = importlib.import_module("chaos")
    reference = chaos.undisturbed()
    outcomes = [chaos.schedule(3, number, number % 2 == 0, reference) for number in range(12)]
    assert not {number: error for number, _, error in outcomes if error}
