# SPDX-License-Identifier: Apache-2.0
"""Each board of the stand-in, through the real nvidia-ml-py, yields its golden FedPipeNode."""

import json
from pathlib import Path

import pytest

from nvml import golden, plans

README = Path(__file__).parents[2] / "edge-agent/README.md"


@pytest.mark.parametrize("name", golden.NAMES)
def test_board_yields_its_golden_node(name: str, tmp_path: Path) -> None:
    made = golden.node(name, tmp_path)
    assert made == json.loads((golden.GOLDEN / f"{name}.json").read_text())
    assert golden.row(made) in README.read_text().splitlines()


def test_there_is_no_golden_file_without_a_board() -> None:
    assert sorted(path.stem for path in golden.GOLDEN.glob("*.json")) == golden.NAMES


def test_the_readme_has_each_board_and_its_plan() -> None:
    """`make generate` writes both tables again."""
    lines = README.read_text().splitlines()
    made = plans.table()
    assert [line for line in lines if line in made] == made
    assert [line for line in lines if line in plans.boards()] == plans.boards()
    assert [line.split("|")[1].strip(" `") for line in made] == golden.NAMES


def test_every_plan_keeps_its_board_s_budget() -> None:
    found, _ = plans.planned()
    assert found.nodes
    for name, chosen in found.nodes.items():
        assert chosen.predicted_bytes <= found.budgets[name]
        assert chosen.predicted_round_seconds <= plans.JOB.rounds.deadline
