# SPDX-License-Identifier: Apache-2.0
"""The systems compared: what each asks of every node, in the form the planner gives it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from bench.paper_fleet import HEADROOM, Kind, common, full_bytes, full_step, kind_of
from fedpipe_api import wire
from fedpipe_api.job import FedPipeJobSpec, Method, Precision, ServerOptimizer
from fedpipe_operator.planner import NodeFacts, PlanRequest, plan, speed, training_memory
from fedpipe_operator.planner.workload import Configuration, Workload, workload

CENTRAL_RANK = 16

Schedule = Literal["constant", "linear", "cosine"]
Layout = Literal["central", "full", "weakest", "by-kind", "planned"]
PLAIN = ServerOptimizer(name="none")


@dataclass(frozen=True)
class System:
    """A system; the last fields are of FedPipe and its ablations.

    `layout` says who decides what a node carries: `central` one A100 with all data; `full` full fine-tuning where it
    fits; `weakest` one rank and micro-batch for all, those of the weakest node; `by-kind` the same micro-batch, but
    each kind its own rank; `planned` the planner. All but `planned` use a float32 base and train every candidate.
    """

    title: str
    layout: Layout
    method: Method = Method.EXACT
    selection: Literal["importance", "random", "all"] = "all"
    quantization: Literal["auto", "none"] = "none"
    uniform: bool = False
    server: ServerOptimizer = PLAIN
    schedule: Schedule = "constant"


def _fedpipe(title: str, method: Method = Method.EXACT, *, selection: str = "importance",
             quantization: str = "auto", uniform: bool = False) -> System:  # fmt: skip
    return System(title, "planned", method, selection, quantization, uniform)  # type: ignore[arg-type]


SYSTEMS = {
    "centralised": System("Centralised LoRA", "central"),
    "vanilla": System("Full fine-tuning, FedAvg", "full"),
    "fedit": System("FedIT", "weakest", Method.AVERAGE),
    "zero-pad": System("HetLoRA (zero-pad)", "by-kind", Method.ZERO_PAD),
    "truncate": System("FlexLoRA (truncate)", "by-kind", Method.TRUNCATE),
    "stack": System("FLoRA (stack)", "by-kind", Method.STACK),
    "fedpipe": _fedpipe("FedPipe"),
    "no-selection": _fedpipe("– no selection", selection="all"),
    "random-selection": _fedpipe("– random selection", selection="random"),
    "no-heterogeneity": _fedpipe("– one configuration for all", uniform=True),
    "no-quantization": _fedpipe("– no quantization", quantization="none"),
    "naive-aggregation": _fedpipe("– zero-pad aggregation", Method.ZERO_PAD),
}
_OUTER: dict[str, dict[str, float | str]] = {
    "rate-1.5": {"name": "none", "learningRate": 1.5},
    **{f"momentum-{beta}": {"name": "fedavgm", "momentum": beta} for beta in (0.3, 0.5, 0.7)},
    "fedadam": {"name": "fedadam"},
}
OUTER = {
    name + suffix: replace(SYSTEMS["fedpipe"], title=f"– server {name}{suffix}", schedule=schedule,
                           server=ServerOptimizer.model_validate(server))
    for suffix, schedule in (("", "constant"), ("-linear", "linear"), ("-cosine", "cosine"))
    for name, server in {"none": {"name": "none"}, **_OUTER}.items()
    if suffix or name != "none"
}  # fmt: skip
"""FedPipe with other server optimizers and schedules of the learning rate: to be asked for by name."""
ALL = SYSTEMS | OUTER
BASELINES = ("vanilla", "fedit", "zero-pad", "truncate", "stack")
ABLATIONS = ("no-selection", "random-selection", "no-heterogeneity", "no-quantization", "naive-aggregation")


@dataclass(frozen=True)
class Assigned:
    """What every node carries, why others do not, and the matrices that are trained."""

    nodes: dict[str, wire.NodePlan]
    left_out: dict[str, str] = field(default_factory=dict)
    selected: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """A system, the model and the fleet: `samples` and `devices` by node."""

    system: System
    shape: wire.ModelShape
    spec: FedPipeJobSpec
    samples: Mapping[str, int]
    devices: Mapping[str, wire.DeviceFacts]


def spec_of(system: System, spec: FedPipeJobSpec, nodes: int) -> FedPipeJobSpec:
    """Return the system's own job; central training does the local steps of all nodes together."""
    assert spec.rounds.local_steps is not None
    steps = spec.rounds.local_steps * (nodes if system.layout == "central" else 1)
    selection = spec.adapter.selection.model_copy(update={"mode": system.selection})
    return spec.model_copy(
        update={
            "rounds": spec.rounds.model_copy(update={"local_steps": steps}),
            "adapter": spec.adapter.model_copy(update={"selection": selection}),
            "aggregation": spec.aggregation.model_copy(
                update={"method": system.method, "server": system.server}
            ),
            "optimizer": spec.optimizer.model_copy(update={"schedule": system.schedule}),
            "quantization": system.quantization,
        }
    )


def assign(
    request: Request, scores: Mapping[str, float] | None = None, previous: Assigned | None = None
) -> Assigned:
    """Return what every node carries.

    Args:
        request: see there.
        scores: importance by matrix, for the planner; None before profiling.
        previous: what the nodes carried when they were profiled.
    """
    system = request.system
    if system.layout == "planned":
        found = _planned(request, scores, previous)
        return _uniform(request, found) if system.uniform else found
    work = workload(request.shape, request.spec, request.shape.matrices)
    kinds = {node: kind_of(node) for node in request.devices}
    configuration, lowest = common(kinds.values(), work.batch)
    if system.layout == "full":
        return _full(request, work, configuration)
    rank = {"central": lambda _: CENTRAL_RANK, "weakest": lambda _: lowest, "by-kind": _own}[system.layout]
    nodes = {node: _node_plan(work, request, node, configuration, rank(kind)) for node, kind in kinds.items()}
    return Assigned(nodes, selected=tuple(work.sides))


def _own(kind: Kind) -> int:
    return kind.rank


def _node_plan(
    work: Workload, request: Request, node: str, configuration: Configuration, rank: int
) -> wire.NodePlan:
    """Return a plan of one rank for all matrices of the workload, each at most full."""
    facts, steps = request.devices[node], request.spec.rounds.local_steps
    assert steps is not None
    ranks = {matrix.name: min(rank, matrix.rows, matrix.columns) for matrix in work.selected}
    return wire.NodePlan(
        precision=configuration.precision,
        micro_batch=configuration.micro_batch,
        accumulation=work.batch // configuration.micro_batch,
        ranks=ranks,
        checkpointing=configuration.checkpointing,
        local_steps=steps,
        predicted_bytes=training_memory.peak_bytes(work, facts, configuration, ranks),
        predicted_step_seconds=speed.step_time(work, facts, configuration, ranks),
        predicted_round_seconds=0,
        limited_by="",
    )


def _full(request: Request, work: Workload, configuration: Configuration) -> Assigned:
    """Return full fine-tuning on the nodes that can hold it."""
    nodes, left_out = {}, {}
    for node, facts in request.devices.items():
        own = Configuration(Precision.FP32, min(kind_of(node).micro_batch, work.batch))
        # The common micro-batch is for nodes that were not declared to hold this.
        chosen = own if kind_of(node).full else configuration
        needed, has = full_bytes(work, facts, chosen), training_memory.budget(facts, HEADROOM)
        if needed > has:
            left_out[node] = f"needs {needed / 2**20:.0f} MiB, has {has / 2**20:.0f} MiB"
            continue
        nodes[node] = _node_plan(work, request, node, chosen, 1).model_copy(
            update={
                "ranks": {},
                "predicted_bytes": needed,
                "predicted_step_seconds": full_step(work, facts, chosen),
            }
        )
    return Assigned(nodes, left_out)


def _planned(request: Request, scores: Mapping[str, float] | None, previous: Assigned | None) -> Assigned:
    before = previous.nodes if previous else {}
    found = plan(
        PlanRequest(
            model=request.shape,
            spec=request.spec,
            nodes=tuple(
                NodeFacts(node, facts, request.samples[node], previous=before.get(node))
                for node, facts in request.devices.items()
            ),
            importance=scores,
            headroom=HEADROOM,
        )
    )
    return Assigned(found.nodes, found.left_out, found.selected)


def _uniform(request: Request, found: Assigned) -> Assigned:
    """Give every node the lowest rank and micro-batch of any, and all steps asked for; precisions stay."""
    work = workload(
        request.shape,
        request.spec,
        tuple(matrix for matrix in request.shape.matrices if matrix.name in found.selected),
    )
    plans = found.nodes.values()
    micro_batch = min(node.micro_batch for node in plans)
    rank = min(rank for node in plans for rank in node.ranks.values())
    nodes = {
        name: _node_plan(work, request, name,
                         Configuration(node.precision, micro_batch, node.checkpointing), rank)
        for name, node in found.nodes.items()
    }  # fmt: skip
    return Assigned(nodes, found.left_out, found.selected)
