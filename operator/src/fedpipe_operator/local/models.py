# SPDX-License-Identifier: Apache-2.0
"""`fedpipe models`: the families of models that were tested, from `models.json`.

`make generate` writes that file, and the same lines into the README, from what tests/bench/families.py found.
"""

import json
from collections.abc import Iterator, Mapping
from importlib.resources import files
from typing import Any


def tested() -> Any:
    """Return what was tested.

    `versions` of libraries; `green`: by task and precisions the families; `refused`: by task and family why.
    """
    return json.loads(files(__package__).joinpath("models.json").read_text(encoding="utf-8"))


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each task and set of precisions, and one for what is refused."""
    for task, by_precisions in found["green"].items():
        for precisions, families in by_precisions.items():
            yield f"{task}, {precisions} ({len(families)}): {', '.join(families)}"
    refused = [
        f"{family} ({why.removeprefix('spec.model: ')})"
        for families in found["refused"].values()
        for family, why in families.items()
    ]
    if refused:
        yield f"refused by fedpipe plan: {', '.join(dict.fromkeys(refused))}"


def summary(found: Mapping[str, Any]) -> str:
    """Return what was tested and with what."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return (
        "Tested as tiny random models: plan, two nodes, two rounds, and the adapter in plain peft with the "
        f"same logits ({versions}). Others that transformers loads and peft adapts may work too: "
        "fedpipe plan reads the model and says what would be trained, or in one line why not."
    )
