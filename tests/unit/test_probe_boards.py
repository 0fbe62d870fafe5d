"""Each board of the stand-in, through the real nvidia-ml-py, yields its golden FedPipeNode."""

import json
from pathlib import Path

import pytest

from nvml import golden

README = Path(__file__).parents[2] / "edge-agent/README.md"


@pytest.mark.parametrize("name", golden.NAMES)
def test_board_yields_its_golden_node(name: str, tmp_path: Path) -> None:
    made = golden.node(name, tmp_path)
    assert made == json.loads((golden.GOLDEN / f"{name}.json").read_text())
    assert golden.row(made) in README.read_text().splitlines()


def test_there_is_no_golden_file_without_a_board() -> None:
    assert sorted(path.stem for path in golden.GOLDEN.glob("*.json")) == golden.NAMES
