"""A few of the random schedules of tests/bench/chaos.py."""

import importlib.util
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.mark.slow
def test_random_faults_lose_and_double_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    specification = importlib.util.spec_from_file_location("chaos", BENCH / "chaos.py")
    assert specification
    assert specification.loader
    chaos = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "chaos", chaos)
    specification.loader.exec_module(chaos)
    outcomes = [chaos.schedule(3, number, number % 8 == 0) for number in range(24)]
    assert not {number: error for number, _, error in outcomes if error}
