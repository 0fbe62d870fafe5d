# SPDX-License-Identifier: Apache-2.0
"""A plan for a fleet (METHOD §2 and §3).

Each group of like nodes is one mixed-integer programme, solved exactly: the ranks are an integer programme
for each configuration (precision, micro-batch, checkpointing) that can still win.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import takewhile

from fedpipe_api import wire
from fedpipe_api.base import UserError
from fedpipe_api.job import Ranks, Rounds
from fedpipe_api.precisions import allowed

from . import format, speed, training_memory
from .calibration import Calibration
from .node_plan import Case, Choice, Infeasible, Problem
from .programme import Known
from .request import NodeFacts, Plan, PlanRequest
from .selection import selected_matrices
from .workload import Configuration, Workload, workload

KEEP_MARGIN = 0.05
"""A plan in use is kept unless another is worth so much more (in the unit of node.Problem.value)."""
KEEP_STEPS = 0.8
"""Nor is it kept for fewer than this share of the local steps that another allows."""
_TIMES = ("seconds", "float32_seconds")
DIGITS, STEP_DIGITS = 2, 3
"""Significant digits by which nodes of a fleet differ, and their local steps; rounded to the worse side."""


def plan(request: PlanRequest) -> Plan:
    """Return what every node carries, and why; pure and deterministic.

    Raises:
        UserError: the request itself is wrong: bad scores, an unknown matrix, a node given twice.
    """
    _check(request)
    spec = request.spec
    matrices = selected_matrices(
        request.model, spec.adapter.selection, request.importance, request.selected, spec.seed
    )
    work = workload(request.model, spec, matrices)
    groups: dict[Case, list[NodeFacts]] = defaultdict(list)
    for facts in sorted(request.nodes, key=lambda facts: facts.name):
        groups[_case(facts, request)].append(facts)
    planned: dict[str, wire.NodePlan] = {}
    left_out: dict[str, str] = {}
    for problem in _problems(request, work, list(groups)):
        found = problem.solve()
        for facts in groups[problem.case]:
            if isinstance(found, Infeasible):
                left_out[facts.name] = found.reason
            else:
                chosen = _kept(problem, found, facts)
                planned[facts.name] = _node_plan(work, spec.rounds, chosen, facts)
    planned = dict(sorted(planned.items()))
    return Plan(
        nodes=planned,
        left_out=dict(sorted(left_out.items())),
        selected=tuple(matrix.name for matrix in matrices),
        candidates=len(request.model.matrices),
        provisional=spec.adapter.selection.mode == "importance" and request.importance is None,
        deadline=spec.rounds.deadline,
        budgets={
            facts.name: training_memory.budget(facts.device, request.headroom, facts.limit)
            for facts in request.nodes
        },
        upload_bytes={name: speed.upload_bytes(work, node.ranks) for name, node in planned.items()},
        under_training=under_training(planned.values(), spec.rounds.deadline),
    )


def calibrate(
    request: PlanRequest, node: str, plan: wire.NodePlan, report: wire.ProfileReport, *, remainder: bool
) -> Calibration:
    """Return a node's calibration from what was measured while it worked by a plan.

    Args:
        request: that names the job and the node.
        node: its name.
        plan: measured.
        report: the measurement; of an update its `micro_batch`, `step_seconds` and `peak_bytes`.
        remainder: whether the node held a global adapter: not in profiling and in round 1.
    """
    device = next(facts.device for facts in request.nodes if facts.name == node)
    matrices = tuple(matrix for matrix in request.model.matrices if matrix.name in plan.ranks)
    work = workload(request.model, request.spec, matrices)
    if not remainder:
        work = replace(work, remainder_rank=0)
    measured = Configuration(plan.precision, report.micro_batch, plan.checkpointing)
    seconds = speed.step_time(work, device, measured, plan.ranks)
    peak = training_memory.peak_bytes(work, device, measured, plan.ranks)
    return Calibration.of(
        (report.step_seconds, seconds), (report.peak_bytes - device.overhead, peak - device.overhead)
    )


def asked_steps(rounds: Rounds, samples: int) -> int:
    """Return the optimizer steps a node is asked for: localSteps, or localEpochs (default 1) of its data."""
    if rounds.local_steps is not None:
        return rounds.local_steps
    return max(1, math.ceil((rounds.local_epochs or 1.0) * samples / rounds.batch_size))


def rank_choices(bounds: Ranks) -> tuple[int, ...]:
    """Return the ranks to choose from: both bounds, and the powers of two between them."""
    powers = takewhile(lambda power: power < bounds.max, (1 << exponent for exponent in range(32)))
    return tuple(sorted({bounds.min, bounds.max, *(power for power in powers if power > bounds.min)}))


def under_training(plans: Iterable[wire.NodePlan], deadline: float) -> float:
    """Return the share of planned local steps over all nodes that will not be done by the deadline."""
    planned = missed = 0
    for node in plans:
        planned += node.local_steps
        if node.predicted_round_seconds > deadline:
            late = (node.predicted_round_seconds - deadline) / node.predicted_step_seconds
            missed += min(node.local_steps, math.ceil(late))
    return missed / planned if planned else 0.0


def _check(request: PlanRequest) -> None:
    names = [facts.name for facts in request.nodes]
    twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if twice is not None:
        raise UserError(f"nodes: {twice} is given twice; name each node once")
    wanted = allowed(request.spec.quantization)
    if not set(wanted) & set(request.model.precisions):
        raise UserError(format.no_effect(wanted, request.model))
    if not 0 <= request.headroom < 1:
        raise UserError(f"headroom: {request.headroom} is not a share of memory; give 0 or more and below 1")


def _case(facts: NodeFacts, request: PlanRequest) -> Case:
    """Return what matters of a node, coarsened to the unfavourable side so that like nodes are equal."""
    device = facts.device
    # Names matter only as far as the speed depends on them.
    name = device.name if device.kind == "cuda" else ""
    kernels = tuple(
        kernel.model_copy(
            update={field: (value := getattr(kernel, field)) and _rounded(value) for field in _TIMES}
        )
        for kernel in device.kernels
    )
    link = device.link_rate and max(1, math.floor(_rounded(device.link_rate, up=False)))
    changes = {"name": name, "uuid": None, "free_memory": 0, "kernels": kernels, "link_rate": link}
    unit = training_memory.coarseness(device.overhead)
    overhead = -(-device.overhead // unit) * unit
    budget = training_memory.budget(device, request.headroom, facts.limit)
    room, seen = budget - overhead, facts.calibration
    if seen:
        room = seen.uncorrected(room)
        room = room // training_memory.coarseness(room) * training_memory.coarseness(room)
    return Case(
        device=device.model_copy(update={**changes, "overhead": overhead}),
        budget=budget,
        room=room,
        seconds=request.spec.rounds.deadline * (1 - request.headroom),
        steps=math.ceil(_rounded(asked_steps(request.spec.rounds, facts.samples), digits=STEP_DIGITS)),
        evaluation_samples=math.ceil(_rounded(facts.evaluation_samples)) if facts.evaluation_samples else 0,
        seconds_factor=_rounded(seen.seconds_factor) if seen else 1.0,
    )


def _rounded(value: float, up: bool = True, digits: int = DIGITS) -> float:
    """Return a positive number to so many significant digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - digits + 1)
    # Division is inexact: 0.3/0.1 is not above 3.
    steps = math.ceil(value / unit - 1e-9) if up else math.floor(value / unit + 1e-9)
    return steps * unit


def _problems(request: PlanRequest, work: Workload, cases: list[Case]) -> list[Problem]:
    """Return the problem of each case; with a method of equal ranks all have the one that each can carry."""
    weights = _weights(work, request.importance)
    ranks = rank_choices(request.spec.adapter.ranks)
    known: Known = {}
    problems = [Problem(work, request.spec, weights, ranks, case, known=known) for case in cases]
    if not request.spec.aggregation.method.equal_ranks:
        return problems
    highest = [index for problem in problems if (index := problem.highest_common_rank()) is not None]
    common = (ranks[min(highest, default=0)],)
    return [Problem(work, request.spec, weights, common, case, known=known) for case in cases]


def _weights(work: Workload, importance: Mapping[str, float] | None) -> dict[str, float]:
    """Return the importance of the selected matrices as shares of their sum; equal where nothing is known."""
    scores = {name: importance[name] if importance else 1.0 for name in work.sides}
    total = sum(scores.values())
    return {name: score / total if total else 1 / len(scores) for name, score in scores.items()}


def _kept(problem: Problem, found: Choice, facts: NodeFacts) -> Choice:
    """Return the node's present plan where it still fits and the new one is not clearly better."""
    old = facts.previous
    if old is None:
        return found
    configuration = Configuration(old.precision, old.micro_batch, old.checkpointing)
    steps = min(old.local_steps, found.steps)
    same = configuration == found.configuration and old.ranks == found.ranks
    if same or steps < KEEP_STEPS * found.steps or not problem.feasible(configuration, old.ranks, steps):
        return found
    value = problem.value(configuration, old.ranks)
    if found.value > value + KEEP_MARGIN:
        return found
    return Choice(configuration, dict(old.ranks), steps, value, old.limited_by, old.reason)


def _node_plan(work: Workload, rounds: Rounds, chosen: Choice, facts: NodeFacts) -> wire.NodePlan:
    """Return a choice in the node's own figures."""
    device, calibration = facts.device, facts.calibration
    configuration = chosen.configuration
    steps = min(chosen.steps, asked_steps(rounds, facts.samples))
    step = speed.step_time(work, device, configuration, chosen.ranks, calibration)
    moved = speed.download_bytes(work) + speed.upload_bytes(work, chosen.ranks)
    evaluation = speed.evaluation_time(work, device, configuration, facts.evaluation_samples)
    evaluation *= calibration.seconds_factor if calibration else 1.0
    return wire.NodePlan(
        precision=configuration.precision,
        micro_batch=configuration.micro_batch,
        accumulation=work.batch // configuration.micro_batch,
        ranks=chosen.ranks,
        checkpointing=configuration.checkpointing,
        local_steps=steps,
        predicted_bytes=training_memory.peak_bytes(work, device, configuration, chosen.ranks, calibration),
        predicted_step_seconds=step,
        predicted_round_seconds=steps * step + evaluation + speed.transfer_time(device, moved),
        limited_by=chosen.limited_by,
        reason=chosen.reason,
    )
