# SPDX-License-Identifier: Apache-2.0
"""Reads the engine's state into samples."""

from collections import Counter
from collections.abc import Mapping

from fedpipe_api.status import Phase
from fedpipe_api.wire import UpdateManifest

from ..engine import Engine
from ..engine.evaluations import evaluation_of
from ..engine.jobs import Job
from ..engine.privacy import job_epsilon, node_epsilon
from ..engine.state import JobState
from ..engine.status import eta_seconds, metric_of, phase_of
from .exposition import Exposition
from .job_totals import Totals

IMPORTANCE_SERIES = 100


def add_all_jobs(samples: Exposition, engine: Engine) -> None:
    """Add how many jobs are in each phase, and how many are quarantined."""
    samples.add("fedpipe_operator_quarantined_jobs", (), len(engine.quarantined))
    counts = Counter(phase_of(job.state) for job in engine.jobs.values())
    for phase in Phase:
        samples.add("fedpipe_operator_jobs", (phase.value,), counts[phase])


def add_job(samples: Exposition, job: Job, totals: Totals, now: float) -> None:
    """Add a job, its latest round and its nodes; `totals` are the job's and follow it."""
    state = job.state
    key = (state.namespace, state.name)
    _add_job(samples, state, key)
    _add_totals(samples, state, totals.follow(state), key)
    _add_round(samples, state, key, now)
    live = frozenset(() if state.finished else state.live)
    latest = _latest_updates(state)
    for node in state.offered:
        _add_node(samples, job, (*key, node), up=node in live, latest=latest.get(node), now=now)


def _latest_updates(state: JobState) -> dict[str, tuple[int, UpdateManifest]]:
    """Return the latest round in which each offered node's update counted, and the update."""
    found: dict[str, tuple[int, UpdateManifest]] = {}
    wanted = set(state.offered)
    for number in reversed(state.rounds):
        updates = state.rounds[number].updates
        found |= {node: (number, updates[node]) for node in wanted & updates.keys()}
        wanted -= updates.keys()
        if not wanted:
            break
    return found


def _add_job(samples: Exposition, state: JobState, key: tuple[str, str]) -> None:
    phase = phase_of(state)
    for known in Phase:
        samples.add("fedpipe_job_phase", (*key, known.value), known is phase)
    task, method = state.spec.model.task.value, state.spec.aggregation.method
    samples.add("fedpipe_job_info", (*key, task, method), 1)
    samples.add("fedpipe_job_submitted_timestamp_seconds", key, state.submitted_at)
    samples.add("fedpipe_job_finished_timestamp_seconds", key, state.finished_at)
    samples.add("fedpipe_job_rounds", (*key, "done"), state.done)
    samples.add("fedpipe_job_rounds", (*key, "wanted"), state.spec.rounds.count)
    nodes: Mapping[str, int] = {
        "offered": len(state.offered),
        "planned": len(state.plan.nodes) if state.plan else 0,
        "ready": len(state.live),
        "lost": len(state.lost),
        "left_out": len(state.plan.left_out) if state.plan else 0,
        "required": state.spec.rounds.min_updates,
    }
    for kind, count in nodes.items():
        samples.add("fedpipe_job_nodes", (*key, kind), count)
    samples.add("fedpipe_job_eta_seconds", key, eta_seconds(state))
    evaluated = next((n for n in range(state.done, -1, -1) if n in state.evaluations), None)
    found = None if evaluated is None else evaluation_of(state, evaluated)
    if found is not None:
        samples.add("fedpipe_job_loss", key, found.loss)
        samples.add("fedpipe_job_accuracy_ratio", key, found.accuracy)
        samples.add("fedpipe_job_evaluated_round", key, evaluated)
    samples.add("fedpipe_job_epsilon", key, job_epsilon(state))
    metric = metric_of(state)
    if metric is not None:
        samples.add("fedpipe_job_best_metric", (*key, metric.name), metric.best)
    if state.plan is not None:
        ranked = sorted(state.plan.scores.items(), key=lambda item: (-item[1], item[0]))
        for matrix, score in ranked[:IMPORTANCE_SERIES]:
            selected = "true" if matrix in state.plan.selected else "false"
            samples.add("fedpipe_job_importance", (*key, matrix, selected), score)


def _add_totals(samples: Exposition, state: JobState, totals: Totals, key: tuple[str, str]) -> None:
    samples.add("fedpipe_job_updates_total", key, totals.updates)
    for verdict in ("clipped", "flagged", "rejected"):
        samples.add("fedpipe_job_suspicious_updates_total", (*key, verdict), totals.verdicts[verdict])
    samples.add("fedpipe_job_stragglers_total", key, totals.stragglers)
    samples.add("fedpipe_job_replans_total", key, max(0, state.plan.version - 1) if state.plan else 0)
    samples.add("fedpipe_job_bytes_up_total", key, totals.bytes_up)
    samples.add("fedpipe_job_bytes_down_total", key, totals.bytes_down)
    samples.add("fedpipe_job_under_training_ratio", key, totals.under_training)


def _add_round(samples: Exposition, state: JobState, key: tuple[str, str], now: float) -> None:
    current = state.current
    is_open = current is not None and current.closed is None and not state.finished
    samples.add("fedpipe_round_open", key, current.opened.round if current and is_open else 0)
    if current is None:
        return
    if is_open:
        samples.add("fedpipe_round_open_seconds", key, now - current.opened_at)
        samples.add("fedpipe_round_deadline_seconds", key, current.deadline - now)
    samples.add("fedpipe_round_participants", key, len(current.opened.participants))
    samples.add("fedpipe_round_updates", key, len(current.updates))
    known = state.rounds.get(state.done)
    if known is None or known.result is None:
        return
    result = known.result
    samples.add("fedpipe_round_seconds", key, (known.result_at or 0) - known.opened_at)
    samples.add("fedpipe_round_aggregation_seconds", key, result.seconds)
    samples.add("fedpipe_round_relative_error", key, result.relative_error)
    samples.add("fedpipe_round_discarded_energy_ratio", key, result.discarded_energy)
    samples.add("fedpipe_round_effective_rank", key, result.effective_rank)
    samples.add("fedpipe_round_adapter_bytes", key, result.adapter.size)


def _add_node(
    samples: Exposition,
    job: Job,
    key: tuple[str, str, str],
    *,
    up: bool,
    latest: tuple[int, UpdateManifest] | None,
    now: float,
) -> None:
    node = key[2]
    state, live = job.state, job.live.get(node)
    samples.add("fedpipe_node_up", key, up)
    if live is not None and not state.finished:
        samples.add("fedpipe_node_silence_seconds", key, max(0.0, now - live.seen))
        if live.progress is not None:
            samples.add("fedpipe_node_step", key, live.progress.step)
            samples.add("fedpipe_node_tokens_per_second", key, live.progress.tokens_per_second)
    if node in state.agents:
        for kind, count in state.agents[node].notes.model_dump().items():
            samples.add("fedpipe_node_rows", (*key, kind.removesuffix("_rows")), count)
    plan = state.plan.nodes.get(node) if state.plan else None
    if plan is not None:
        samples.add("fedpipe_node_plan_info", (*key, plan.precision, plan.limited_by), 1)
        samples.add("fedpipe_node_micro_batch", key, plan.micro_batch)
        samples.add("fedpipe_node_accumulation", key, plan.accumulation)
        samples.add("fedpipe_node_local_steps", key, plan.local_steps)
        samples.add("fedpipe_node_matrices", key, len(plan.ranks))
        samples.add("fedpipe_node_rank", (*key, "min"), min(plan.ranks.values(), default=None))
        samples.add("fedpipe_node_rank", (*key, "max"), max(plan.ranks.values(), default=None))
        samples.add("fedpipe_node_predicted_memory_bytes", key, plan.predicted_bytes)
        samples.add("fedpipe_node_predicted_step_seconds", key, plan.predicted_step_seconds)
    samples.add("fedpipe_node_epsilon", key, node_epsilon(state, node))
    profile = state.profiles.get(node)
    if latest is not None:
        last, manifest = latest
        samples.add("fedpipe_node_measured_memory_bytes", key, manifest.peak_bytes)
        samples.add("fedpipe_node_measured_step_seconds", key, manifest.step_seconds)
        samples.add("fedpipe_node_train_loss", key, manifest.train_loss)
        samples.add("fedpipe_node_update_round", key, last)
        samples.add("fedpipe_node_update_bytes", key, manifest.size)
    elif profile is not None:
        samples.add("fedpipe_node_measured_memory_bytes", key, profile.report.peak_bytes)
        samples.add("fedpipe_node_measured_step_seconds", key, profile.report.step_seconds)
    known = state.rounds.get(state.done)
    check = known.result.checks.get(node) if known and known.result else None
    if check is not None:
        samples.add("fedpipe_node_update_norm", key, check.norm)
        samples.add("fedpipe_node_update_cosine", key, check.cosine)
