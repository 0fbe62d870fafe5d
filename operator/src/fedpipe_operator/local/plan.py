# SPDX-License-Identifier: Apache-2.0
"""`fedpipe plan`: what each node of a fleet would carry, by its declared capacity; starts no training.

`fedpipe run` begins with the same check.
"""

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedpipe_api import host_memory
from fedpipe_api.base import UserError
from fedpipe_api.precisions import Precision, allowed
from fedpipe_api.wire import Registration

from ..aggregate import read_given
from ..planner import NodeFacts, Plan, PlanRequest, modules_line, plan, rows, summary_line, with_noise
from .agents import ask_agent, capacity_of
from .interrupt import clean_interrupt
from .live import stage
from .manifest import LocalJob, memory_warning

READING = "reading rows and model"
"""What `check` does, for people."""
_NAMED = 4
"""Nodes of one reason that are named."""
_WIDE = 92
"""Columns from which the table has room for wide gaps."""


def plan_job(local: LocalJob) -> int:
    """Print the plan; UserError when too few nodes fit."""
    console = Console(highlight=False)
    _warn(local)
    with stage(console, READING):
        registrations = describe(local, verify=_without_float32(local))
        made = make(local, registrations)
    table = Table(box=None, padding=(0, 2 if console.width >= _WIDE else 1, 0, 0), header_style="dim")
    ranks = f"ranks (of {made.candidates} matrices)"
    for title in ("node", "precision", "batch", ranks, "memory", "round"):
        table.add_column(title, no_wrap=title != ranks)
    table.add_column("limited by", min_width=10)
    for row in rows(made):
        table.add_row(row.node, row.precision, row.batch, row.ranks, row.memory, row.round, row.limited_by)
    console.print(table)
    console.print(summary_line(made), soft_wrap=True)
    console.print(modules_line(registrations[0].model), soft_wrap=True)
    reasons = {name: f"{node.limited_by}: {node.reason}" for name, node in made.nodes.items()}
    for line in _why(reasons | {name: f"left out: {why}" for name, why in local.excluded.items()}):
        console.print(line, soft_wrap=True)
    _check_count(local, made)
    return 0


def check(local: LocalJob) -> None:
    """Read data and model and plan, as `plan_job` does; UserError for what would keep a run from starting."""
    _warn(local)
    _check_count(local, make(local, describe(local)))


def _without_float32(local: LocalJob) -> bool:
    """Whether fp32 is left out somewhere: how much slower than it another is, only a timed kernel shows."""
    offered = [allowed(local.job.spec.quantization), *(member.node.precisions for member in local.members)]
    return any(Precision.FP32 not in precisions for precisions in offered)


def _warn(local: LocalJob) -> None:
    # What is declared of a GPU's memory is not this machine's.
    if not os.environ.get("CUDA_VISIBLE_DEVICES"):
        warning = memory_warning(local, host_memory.read().total)
        if warning:
            sys.stderr.write(f"{warning}\n")


def _check_count(local: LocalJob, made: Plan) -> None:
    least = local.job.spec.nodes.min
    if len(made.nodes) < least:
        raise UserError(
            f"{local.job_file}: spec.nodes.min: {least} nodes are required but {len(made.nodes)} fit. "
            "Lower min, or give nodes what they lack by the last column of `fedpipe plan`: memory (or lower "
            "adapter.ranks.min or data.maxLength), time (raise rounds.deadline or lower rounds.batchSize)."
        )


def _why(reasons: Mapping[str, str]) -> Iterator[str]:
    """Yield a line per reason, before it the nodes that it holds for."""
    nodes: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        nodes.setdefault(reason, []).append(name)
    for reason, names in nodes.items():
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        yield f"{', '.join(names[:_NAMED])}{more}: {reason}"


def make(local: LocalJob, registrations: list[Registration]) -> Plan:
    """Return the plan by what the members' agents would register with."""
    found = [(member.node.name, each) for member, each in zip(local.members, registrations, strict=True)]
    nodes = tuple(NodeFacts(name, each.device, each.samples, each.evaluation_samples) for name, each in found)
    spec = local.job.spec
    made = plan(PlanRequest(model=found[0][1].model, spec=spec, nodes=nodes))
    if spec.privacy:
        samples = {facts.name: facts.samples for facts in nodes}
        noisy, left_out = with_noise(made.nodes, spec.privacy, samples, {}, spec.rounds.count)
        if left_out and len(noisy) < spec.nodes.min:
            node, why = next(iter(left_out.items()))
            raise UserError(f"{local.job_file}: {why} (node {node})")
        made = replace(made, nodes=noisy, left_out={**made.left_out, **left_out})
    return made


def describe(local: LocalJob, *, verify: bool = False) -> list[Registration]:
    """Return what each member's agent would register with.

    The agent reads model and data, in a process of its own: what it would refuse is refused, and counted is
    what it counts. With `verify` it also runs and times a kernel of each precision, which takes seconds.
    """
    with clean_interrupt(), tempfile.TemporaryDirectory(prefix="fedpipe-plan-") as scratch:
        job = Path(scratch) / "job.json"
        job.write_text(local.job.to_json(), encoding="utf-8")
        capacities = [Path(scratch) / f"{member.node.name}.json" for member in local.members]
        for member, path in zip(local.members, capacities, strict=True):
            path.write_text(capacity_of(member).to_json(), encoding="utf-8")
        data = [str(member.data) for member in local.members]
        try:
            said = ask_agent(
                *("describe", "--job", str(job), "--model", local.model),
                *("--data", *data, "--capacity", *map(str, capacities)),
                *(["--verify"] if verify else []),
                model=local.model,
            )
        except UserError as error:
            message = str(error)
            raise UserError(
                f"{local.job_file}: {message}" if message.startswith("spec.") else message
            ) from None
    found = [Registration.model_validate_json(line) for line in said.splitlines()]
    given = local.job.spec.adapter.from_
    if given is not None and given.path is not None:
        try:
            read_given(Path(given.path), local.job.spec, found[0].model)
        except UserError as error:
            raise UserError(f"{local.job_file}: {error}") from None
    return found
