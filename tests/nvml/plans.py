# SPDX-License-Identifier: Apache-2.0
"""What each board would carry of one 7B job: golden FedPipeNode → the real planner → a line of the table in
edge-agent/README.md; `python tests/nvml/plans.py` (`make generate`) writes it, and the table of boards above it."""

import json
import sys
from pathlib import Path

from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.append(str(Path(__file__).parents[2] / "charts"))

from generate import filled

from fedpipe_agent.train.shape import read_shape
from fedpipe_api import units, wire
from fedpipe_api.job import FedPipeJobSpec, Task
from fedpipe_api.node import READY, FedPipeNode
from fedpipe_operator.planner import NodeFacts, Plan, PlanRequest, plan, rows
from nvml import golden

README = Path(__file__).parents[2] / "edge-agent/README.md"
BOARDS_HEAD = (
    "| board | device | memory | free | precisions | Ready | problems |\n|---|---|---|---|---|---|---|\n"
)
PLANS_HEAD = (
    "| board | precision | batch | ranks | memory | step | round | what limits it, and why |\n"
    "|---|---|---|---|---|---|---|---|\n"
)
GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.json"))
MIB = 2**20
CONTEXT = {"cuda": 500 * MIB, "cpu": 400 * MIB}
"""Overhead an agent would measure when it registers."""
SAMPLES = 2000
LLAMA_7B = LlamaConfig()  # the configuration's own sizes are the 7B's
JOB = FedPipeJobSpec.model_validate(
    {
        "model": {"hostPath": {"path": "/models/7b"}, "task": "causal-lm"},
        "data": {"volume": {"hostPath": {"path": "/data"}}, "train": "train.jsonl", "maxLength": 512},
        "rounds": {"count": 10, "localSteps": 20, "batchSize": 16, "deadline": "20m"},
        "adapter": {"ranks": {"min": 4, "max": 64}, "selection": {"mode": "all"}},
    }
)


def node(name: str) -> FedPipeNode:
    """Return a board's golden FedPipeNode."""
    return FedPipeNode.model_validate(json.loads((GOLDEN / f"{name}.json").read_text()))


def device(found: FedPipeNode) -> wire.DeviceFacts | str:
    """Return what an agent on the node would register, its kernels as the probe derived them; or why none runs.

    An agent gets one GPU, with MIG one instance; here the one with the most free memory.
    """
    status = found.status
    assert status is not None
    ready = next(condition for condition in status.conditions if condition.type == READY)
    if ready.status != "True":
        return f"not ready ({ready.reason}): {ready.message}"
    assert status.cpu is not None
    kind, name, capability, free = "cpu", "cpu", None, status.cpu.free_memory
    for gpu in status.devices:
        parts = [part.free_memory for part in (gpu.mig_instances if gpu.mig_enabled else (gpu,))]
        most = max((part for part in parts if part is not None), default=0)
        if kind == "cpu" or most > free:
            kind, name, capability, free = "cuda", gpu.name, gpu.compute_capability, most
    return wire.DeviceFacts(
        kind=kind,
        name=name,
        compute_capability=capability,
        free_memory=free,
        overhead=CONTEXT[kind],
        threads=status.cpu.cores,
        speed=1.0,
        link_rate=status.link_rate,
        kernels=tuple(
            wire.KernelResult(precision=offer.precision, usable=offer.usable, message=offer.message)
            for offer in status.precisions
        ),
    )


def planned() -> tuple[Plan, dict[str, str]]:
    """Return the plan for all boards together, and why the others have no agent."""
    shape = read_shape(LLAMA_7B, Task.CAUSAL_LM)
    found = {name: device(node(name)) for name in NAMES}
    facts = tuple(NodeFacts(name, each, SAMPLES) for name, each in found.items() if not isinstance(each, str))
    return plan(PlanRequest(shape, JOB, facts)), {n: why for n, why in found.items() if isinstance(why, str)}


def table() -> list[str]:
    """Return a line per board: its plan, what it takes of what it may, and the limit that binds."""
    found, without = planned()
    lines = {}
    for row in rows(found):
        cells = [row.precision, row.batch, row.ranks, row.memory]
        if row.node in found.nodes:
            chosen = found.nodes[row.node]
            cells += [
                units.duration(chosen.predicted_step_seconds),
                row.round,
                f"{row.limited_by}: {row.reason}",
            ]
        else:
            cells += ["–", "–", row.limited_by]
        lines[row.node] = cells
    for name, why in without.items():
        lines[name] = ["–"] * 6 + [why]
    return [f"| {' | '.join([f'`{name}`', *cells])} |" for name, cells in sorted(lines.items())]


def boards() -> list[str]:
    """Return a line per board: what its golden FedPipeNode shows."""
    return [golden.row(json.loads((GOLDEN / f"{name}.json").read_text())) for name in NAMES]


if __name__ == "__main__":
    README.write_text(
        filled(
            README.read_text(),
            boards=f"{BOARDS_HEAD}{chr(10).join(boards())}\n",
            plans=f"{PLANS_HEAD}{chr(10).join(table())}\n",
        )
    )
