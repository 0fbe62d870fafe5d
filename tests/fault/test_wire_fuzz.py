# SPDX-License-Identifier: Apache-2.0
"""The wire fuzz of tests/bench/fuzz.py, for some seconds."""

from pathlib import Path

import pytest

from bench.fuzz import fuzz


@pytest.mark.timeout(180)
async def test_some_seconds_of_fuzz_find_nothing(tmp_path: Path) -> None:
    result = await fuzz(tmp_path, seconds=20, seed=3, requests=40)
    assert result["findings"] == []
    restarts, held = result["restarts"], result["one_process"]
    assert isinstance(restarts, dict)
    assert isinstance(held, dict)
    assert sum(restarts.values()) >= 2
    assert held["memory_mib"][1] - held["memory_mib"][0] < 20
