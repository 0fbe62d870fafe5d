"""`fedpipe plan`: what each node of a fleet would carry, by its declared capacity; starts nothing."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedpipe_api.base import UserError
from fedpipe_api.job import FedPipeJobSpec
from fedpipe_api.wire import DeviceFacts, KernelResult, ModelShape

from ..planner import NodeFacts, Plan, PlanRequest, longest_input, plan, read_shape, rows, summary_line
from .manifest import LocalJob, Member

RUNTIME_BYTES = 410 * 2**20
"""What an agent holds before it loads a model: Python, torch, transformers, peft."""


_NAMED = 4
"""Nodes of one reason that are named."""
_WIDE = 92
"""Columns from which the table has room for wide gaps."""


def plan_job(local: LocalJob) -> int:
    """Print the plan; UserError when too few nodes fit."""
    made = make(local)
    console = Console(highlight=False)
    table = Table(box=None, padding=(0, 2 if console.width >= _WIDE else 1, 0, 0), header_style="dim")
    ranks = f"ranks (of {made.candidates} weights)"
    for title in ("node", "precision", "batch", ranks, "memory", "round"):
        table.add_column(title, no_wrap=title != ranks)
    table.add_column("limited by", min_width=10)
    for row in rows(made):
        table.add_row(row.node, row.precision, row.batch, row.ranks, row.memory, row.round, row.limited_by)
    console.print(table)
    console.print(summary_line(made), soft_wrap=True)
    reasons = {name: f"{node.limited_by}: {node.reason}" for name, node in made.nodes.items()}
    for line in _why(reasons | {name: f"left out: {why}" for name, why in local.excluded.items()}):
        console.print(line, soft_wrap=True)
    least = local.job.spec.nodes.min
    if len(made.nodes) < least:
        raise UserError(
            f"{local.job_file}: spec.nodes.min: {least} nodes are required but {len(made.nodes)} fit. "
            "Lower min, or give nodes what the last column says they lack: memory (or lower "
            "adapter.ranks.min or data.maxLength), time (raise rounds.deadline or lower rounds.batchSize)."
        )
    return 0


def _why(reasons: Mapping[str, str]) -> Iterator[str]:
    """Yield a line per reason, before it the nodes that it holds for."""
    nodes: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        nodes.setdefault(reason, []).append(name)
    for reason, names in nodes.items():
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        yield f"{', '.join(names[:_NAMED])}{more}: {reason}"


def make(local: LocalJob) -> Plan:
    """Return the plan.

    UserError when the model's configuration is not on this machine, or has no room for what the job asks.
    """
    spec = local.job.spec
    nodes = tuple(_facts(spec, member) for member in local.members)
    return plan(PlanRequest(model=shape_of(local), spec=spec, nodes=nodes))


def shape_of(local: LocalJob) -> ModelShape:
    """Return the shape of the job's model."""
    model, spec = Path(local.model), local.job.spec
    if not model.is_dir():
        raise UserError(
            f"{local.fleet_file}: model: required to plan, because {local.model} lies on a hub; "
            "give a directory with its config.json"
        )
    asked, longest = spec.data.max_length, longest_input(model)
    if longest is not None and asked > longest:
        raise UserError(
            f"{local.job_file}: spec.data.maxLength: {asked}, but the model has {longest} positions; lower it"
        )
    try:
        return read_shape(model, spec.model.task, len(spec.model.labels), spec.adapter.modules)
    except UserError as error:
        if str(error).startswith("spec."):
            raise UserError(f"{local.job_file}: {error}") from None
        raise


def _facts(spec: FedPipeJobSpec, member: Member) -> NodeFacts:
    node = member.node
    train = _rows(member.data / spec.data.train)
    if spec.data.evaluation is not None:
        held_out = _rows(member.data / spec.data.evaluation)
    else:
        held_out = int(train * spec.data.evaluation_share)
        train -= held_out
    device = DeviceFacts(
        kind="cpu",
        name=node.device,
        free_memory=node.memory or _available(),
        overhead=RUNTIME_BYTES,
        threads=node.threads or os.cpu_count() or 1,
        speed=node.speed,
        link_rate=node.link_rate,
        kernels=tuple(KernelResult(precision=precision, usable=True) for precision in node.precisions),
    )
    return NodeFacts(node.name, device, max(1, train), held_out)


def _rows(path: Path) -> int:
    """Return about how many rows a data file has: its lines, without a header; Parquet says it itself."""
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet

            return int(pyarrow.parquet.read_metadata(path).num_rows)
        except ImportError:
            raise UserError(f"{path}: Parquet needs pyarrow; pip install pyarrow") from None
        except pyarrow.ArrowException as error:
            raise UserError(f"{path}: not Parquet: {' '.join(str(error).split())}") from None
    with path.open("rb") as file:
        lines = sum(1 for line in file if line.strip())
    return lines - 1 if ".csv" in path.suffixes else lines


def _available() -> int:
    found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
    return int(found[1]) * 1024 if found else 0
