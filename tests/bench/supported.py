# SPDX-License-Identifier: Apache-2.0
"""Writes what `fedpipe models` prints, and the README's tables of models, from results/families.json and the planner.

`python tests/bench/supported.py` (`make generate`).
"""

import json
import sys
import textwrap
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.append(str(Path(__file__).parents[2] / "charts"))

from generate import filled

from bench import published
from fedpipe_operator.local.models import lines, summary

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
MODELS = ROOT / "operator/src/fedpipe_operator/local/models.json"
RESULTS = Path(__file__).parent / "results" / "families.json"


def tested() -> dict[str, Any]:
    """Return the outcomes of the bench as `fedpipe_operator.local.models` reads them."""
    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    cases: dict[str, dict[str, list[dict[str, str]]]] = defaultdict(lambda: defaultdict(list))
    for row in result["rows"]:
        cases[row["task"]][row["family"]].append(row)
    green: dict[str, dict[str, list[str]]] = {}
    refused: dict[str, dict[str, str]] = {}
    for task, families in cases.items():
        for family, rows in sorted(families.items()):
            passed = [row["precision"] for row in rows if row["outcome"] == "green"]
            if passed:
                green.setdefault(task, {}).setdefault(" and ".join(passed), []).append(family)
            else:
                refused.setdefault(task, {})[family] = rows[0]["detail"]
    return {"versions": result["versions"], "green": green, "refused": refused}


def models() -> str:
    """Return the file that `fedpipe models` reads."""
    return json.dumps(tested(), indent=1) + "\n"


def readme(text: str) -> str:
    """Return the README with its tables of models."""
    found = tested()
    items = (
        textwrap.fill(f"- {line}", 128, subsequent_indent="  ", break_on_hyphens=False)
        for line in lines(found)
    )
    tested_lines = [f"{textwrap.fill(summary(found), 128, break_on_hyphens=False)}\n", *items]
    return filled(text, models="\n".join(tested_lines) + "\n", published="\n".join(published.table()) + "\n")


if __name__ == "__main__":
    MODELS.write_text(models(), encoding="utf-8")
    README.write_text(readme(README.read_text(encoding="utf-8")), encoding="utf-8")
