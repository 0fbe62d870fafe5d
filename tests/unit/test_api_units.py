# SPDX-License-Identifier: Apache-2.0
"""Texts of sizes, rates and durations; files replaced as a whole."""

from pathlib import Path

import pytest

from fedpipe_api import units
from fedpipe_api.files import replaced


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (units.memory(0), "0 MiB"),
        (units.memory(3000), "3 KiB"),
        (units.memory(310 * 2**20), "310 MiB"),
        (units.memory(1023 * 2**20), "1.0 GiB"),
        (units.memory(80 * 2**30), "80.0 GiB"),
        (units.transfer(40_000), "40.0 kB"),
        (units.transfer(3_100_000), "3.1 MB"),
        (units.transfer(1_200_000_000), "1.2 GB"),
        (units.rate(999_000), "999.0 kB/s"),
        (units.duration(0.85), "850ms"),
        (units.duration(9.0), "9s"),
        (units.duration(175), "2m55s"),
        (units.duration(3780), "1h03m"),
    ],
)
def test_units_are_written_one_way(text: str, wanted: str) -> None:
    assert text == wanted


def test_a_file_that_fails_half_way_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    with replaced(path) as file:
        file.write(b"old")

    def fail_half_way() -> None:
        with replaced(path, mode=0o600) as file:
            file.write(b"ne")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert [found.name for found in tmp_path.iterdir()] == ["report.html"]
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"old", 0o644)
