# SPDX-License-Identifier: Apache-2.0
"""The FedPipeNode that each board yields on a fixed host; `python tests/nvml/golden.py` writes them again."""

import json
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from fedpipe_agent.probe import status
from fedpipe_api.node import READY, Cpu, FedPipeNode
from fedpipe_api.objects import ObjectMeta
from nvml.standin import BOARDS, HERE, StandIn, board

GOLDEN = HERE / "golden"
NAMES = sorted(path.stem for path in BOARDS.glob("*.json"))
NOW = datetime(2026, 1, 1, tzinfo=UTC)
GIB = 2**30
CPU = Cpu(cores=8, total_memory=8 * GIB, free_memory=5 * GIB, cache_disk_free=200 * GIB)


def node(name: str, directory: Path) -> dict[str, Any]:
    """Return the board's FedPipeNode, read through the real nvidia-ml-py."""
    reading = StandIn(directory, board(name)).read(timeout=2.0 if name == "hanging" else 30.0)
    reading = reading.model_copy(update={"boards": 1, "vendor": "NVIDIA"})
    found = FedPipeNode(metadata=ObjectMeta(name=name), status=status.build(reading, CPU, now=NOW))
    return found.to_dict() | {"metadata": {"name": name}}


def row(found: dict[str, Any]) -> str:
    """Return the board's line of the table in edge-agent/README.md."""
    reported = found["status"]
    ready = next(entry for entry in reported["conditions"] if entry["type"] == READY)
    troubles = [
        entry for entry in reported["conditions"] if entry["type"] != READY and entry["status"] == "True"
    ]
    cells = [
        f"`{found['metadata']['name']}`",
        reported["deviceSummary"],
        reported["memorySummary"],
        reported["freeSummary"],
        reported["precisionSummary"] or "–",
        f"{ready['status']} ({ready['reason']})",
        ", ".join(f"{entry['type']} ({entry['reason']})" for entry in troubles) or "–",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for each in NAMES:
        with tempfile.TemporaryDirectory() as scratch:
            made = node(each, Path(scratch))
        text = json.dumps(made, indent=2, ensure_ascii=False)
        (GOLDEN / f"{each}.json").write_text(f"{text}\n")
        print(row(made))
