# SPDX-License-Identifier: Apache-2.0
"""What a run measured, round by round: the rows of `metrics.jsonl`, on which report and plots rest."""

import json
from typing import Any

from fedpipe_api import units
from fedpipe_api.job import Phase
from fedpipe_api.wire import NodePlan

from ..engine.state import JobState, Round, evaluation_of, perplexity
from .directory import History
from .wording import called, figure, shown_metric

RoundRow = dict[str, Any]


def rounds(history: History) -> list[RoundRow]:
    """Return one object for each round, with seconds and bytes; round 0 is the untrained start."""
    state = history.state
    first = [0] if evaluation_of(state, 0) else []
    return [row(state, n) for n in first + [n for n, known in sorted(state.rounds.items()) if known.result]]


def row(state: JobState, number: int) -> RoundRow:
    """Return the object of one aggregated round, or of 0, the untrained start."""
    found = {"round": number} | _evaluation(state, number)
    return found | _round(state, state.rounds[number]) if number else found


def to_jsonl(rows: list[RoundRow]) -> str:
    """Return the rows as JSON lines."""
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def _evaluation(state: JobState, number: int) -> RoundRow:
    found = evaluation_of(state, number)
    if found is None:
        return {"loss": None, "accuracy": None, "perplexity": None}
    return {
        "loss": found.loss,
        "accuracy": found.accuracy,
        "perplexity": found.perplexity,
        "evaluationSamples": found.samples,
        "evaluationNodes": found.nodes,
    }


def _round(state: JobState, known: Round) -> RoundRow:
    assert known.result is not None
    assert known.closed is not None
    updates = known.updates.values()
    plan = state.plans[known.opened.plan]
    taking_part = [plan.nodes[node] for node in known.opened.participants if node in plan.nodes]
    planned_steps = sum(each.local_steps for each in taking_part)
    opened_seconds = (known.closed_at or 0) - known.opened_at
    busy = max((m.download_seconds + m.evaluate_seconds + m.train_seconds for m in updates), default=0.0)
    return {
        "updates": len(updates),
        "participants": len(known.opened.participants),
        "stragglers": known.closed.stragglers,
        "seconds": (known.result_at or 0) - known.opened_at,
        "collectSeconds": opened_seconds,
        "aggregateSeconds": known.result.seconds,
        # Everything of the round that the busiest node was not at work in.
        "overheadSeconds": max(0.0, (known.result_at or 0) - known.opened_at - busy),
        "bytesUp": sum(manifest.size for manifest in updates),
        "bytesDown": known.closed.bytes_down,
        "underTraining": 1 - sum(manifest.steps for manifest in updates) / max(1, planned_steps),
        "relativeError": known.result.relative_error,
        "discardedEnergy": known.result.discarded_energy,
        "effectiveRank": known.result.effective_rank,
        "plan": known.opened.plan,
        "nodes": {node: _node(state, known, node) for node in known.opened.participants},
    }


def planned(plan: NodePlan) -> RoundRow:
    """Return what a plan gives a node."""
    ranks = list(plan.ranks.values())
    return {
        "precision": str(plan.precision),
        "microBatch": plan.micro_batch,
        "accumulation": plan.accumulation,
        "matrices": len(ranks),
        "minRank": min(ranks, default=0),
        "maxRank": max(ranks, default=0),
        "plannedSteps": plan.local_steps,
        "predictedBytes": plan.predicted_bytes,
        "predictedStepSeconds": plan.predicted_step_seconds,
    }


def _node(state: JobState, known: Round, name: str) -> RoundRow:
    plan = state.plans[known.opened.plan].nodes[name]
    manifest = known.updates.get(name)
    check = known.result.checks.get(name) if known.result else None
    evaluation = state.evaluations.get(known.opened.round, {}).get(name)
    row = planned(plan) | {"counted": manifest is not None}
    if manifest is not None:
        row |= {
            "samples": manifest.samples,
            "steps": manifest.steps,
            "tokens": manifest.tokens,
            "trainLoss": manifest.train_loss,
            "peakBytes": manifest.peak_bytes,
            "stepSeconds": manifest.step_seconds,
            "downloadSeconds": manifest.download_seconds,
            "evaluateSeconds": manifest.evaluate_seconds,
            "trainSeconds": manifest.train_seconds,
            "bytesUp": manifest.size,
        }
    if check is not None:
        row |= {"updateNorm": check.norm, "updateCosine": check.cosine, "verdict": check.verdict}
    if evaluation is not None:
        loss = evaluation.loss_sum / evaluation.tokens
        row |= {
            "loss": loss,
            "perplexity": perplexity(loss),
            "accuracy": None if evaluation.correct is None else evaluation.correct / evaluation.samples,
        }
    return row


def outcome(history: History, rows: list[RoundRow]) -> str:
    """Return the one line that sums the run up."""
    state = history.state
    spent = units.duration((state.finished_at or history.last_at) - state.submitted_at)
    name = shown_metric(state)
    series = [row[name] for row in rows if row[name] is not None]
    up, down = (sum(row.get(key, 0) for row in rows) for key in ("bytesUp", "bytesDown"))
    head = "done in" if state.finished and state.finished.phase is Phase.SUCCEEDED else "stopped after"
    parts = [f"{head} {spent}"]
    if series:
        start = "as given" if state.given else "untrained"
        before = f" ({start} {figure(name, series[0])})" if rows[0]["round"] == 0 else ""
        parts.append(f"{called(name)} {figure(name, series[-1])}{before}")
    parts.append(f"{units.transfer(up)} up, {units.transfer(down)} down")
    return " · ".join(parts)


def memory(size: int | None) -> str:
    """Return bytes of memory as text, empty where they are not known."""
    return "" if size is None else units.memory(size)
