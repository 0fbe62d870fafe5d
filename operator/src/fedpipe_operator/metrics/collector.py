"""Reads the engine's state into metric families."""

from collections import Counter
from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fedpipe_api.status import Phase

from ..engine import Engine
from ..engine.jobs import Job
from ..engine.state import JobState, evaluation_of
from ..engine.status import eta_seconds, metric_of, phase_of
from .table import NAMES

IMPORTANCE_SERIES = 100


class Samples:
    """Metric families that fill up as they are given values."""

    def __init__(self) -> None:
        self._families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}

    def add(self, name: str, labels: tuple[str, ...], value: float | None) -> None:
        """Add a value to the family of the table with that name; None is left out."""
        if value is None:
            return
        family = self._families.get(name)
        if family is None:
            known = NAMES[name]
            kind = CounterMetricFamily if known.kind == "counter" else GaugeMetricFamily
            family = self._families[name] = kind(name, known.help, labels=known.labels)
        family.add_metric(labels, value)

    def families(self) -> Iterator[Metric]:
        """Return what was filled."""
        return iter(self._families.values())


class JobCollector(Collector):
    """All jobs of an engine, for a prometheus_client registry."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Return the families as of now."""
        samples = Samples()
        now = self._engine.clock()
        for job in list(self._engine.jobs.values()):
            add_job(samples, job, now)
        add_phases(samples, self._engine)
        return samples.families()


def add_phases(samples: Samples, engine: Engine) -> None:
    """Add how many jobs are in each phase."""
    counts = Counter(phase_of(job.state) for job in engine.jobs.values())
    for phase in Phase:
        samples.add("fedpipe_operator_jobs", (phase.value,), counts[phase])


def add_job(samples: Samples, job: Job, now: float) -> None:
    """Add a job, its latest round and its nodes."""
    state = job.state
    key = (state.namespace, state.name)
    _add_job(samples, state, key)
    _add_totals(samples, state, key)
    _add_round(samples, state, key, now)
    for node in state.offered:
        _add_node(samples, job, node, (*key, node), now)


def _add_job(samples: Samples, state: JobState, key: tuple[str, str]) -> None:
    phase = phase_of(state)
    for known in Phase:
        samples.add("fedpipe_job_phase", (*key, known.value), known is phase)
    task, method = state.spec.model.task.value, state.spec.aggregation.method.value
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
    metric = metric_of(state)
    if metric is not None:
        samples.add("fedpipe_job_best_metric", (*key, metric.name), metric.best)
    if state.plan is not None:
        ranked = sorted(state.plan.scores.items(), key=lambda item: (-item[1], item[0]))
        for matrix, score in ranked[:IMPORTANCE_SERIES]:
            selected = "true" if matrix in state.plan.selected else "false"
            samples.add("fedpipe_job_importance", (*key, matrix, selected), score)


def _add_totals(samples: Samples, state: JobState, key: tuple[str, str]) -> None:
    updates = [manifest for known in state.rounds.values() for manifest in known.updates.values()]
    closed = [known.closed for known in state.rounds.values() if known.closed]
    results = [known.result for known in state.rounds.values() if known.result]
    verdicts = Counter(check.verdict for result in results for check in result.checks.values())
    samples.add("fedpipe_job_updates_total", key, len(updates))
    for verdict in ("clipped", "flagged", "rejected"):
        samples.add("fedpipe_job_suspicious_updates_total", (*key, verdict), verdicts[verdict])
    samples.add("fedpipe_job_stragglers_total", key, sum(len(record.stragglers) for record in closed))
    samples.add("fedpipe_job_replans_total", key, max(0, state.plan.version - 1) if state.plan else 0)
    samples.add("fedpipe_job_bytes_up_total", key, sum(manifest.size for manifest in updates))
    samples.add("fedpipe_job_bytes_down_total", key, sum(record.bytes_down for record in closed))
    samples.add("fedpipe_job_under_training_ratio", key, under_training(state))


def under_training(state: JobState) -> float | None:
    """Return the share of planned local steps that were not done when rounds closed (METHOD §2).

    Steps that a straggler was last heard of at were done, though not counted in the aggregate. What a
    straggler had planned is taken from the present plan.
    """
    planned = done = 0
    for known in state.rounds.values():
        if known.closed is None:
            continue
        for manifest in known.updates.values():
            planned += manifest.planned_steps
            done += min(manifest.steps, manifest.planned_steps)
        for node, heard in known.closed.stragglers.items():
            plan = state.plan.nodes.get(node) if state.plan else None
            if plan is not None:
                planned += plan.local_steps
                done += min(heard, plan.local_steps)
    return 1 - done / planned if planned else None


def _add_round(samples: Samples, state: JobState, key: tuple[str, str], now: float) -> None:
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


def _add_node(samples: Samples, job: Job, node: str, key: tuple[str, str, str], now: float) -> None:
    state, live = job.state, job.live.get(node)
    samples.add("fedpipe_node_up", key, node in state.live and not state.finished)
    if live is not None and not state.finished:
        samples.add("fedpipe_node_silence_seconds", key, max(0.0, now - live.seen))
        if live.progress is not None:
            samples.add("fedpipe_node_step", key, live.progress.step)
            samples.add("fedpipe_node_tokens_per_second", key, live.progress.tokens_per_second)
    plan = state.plan.nodes.get(node) if state.plan else None
    if plan is not None:
        samples.add("fedpipe_node_plan_info", (*key, plan.precision.value, plan.limited_by), 1)
        samples.add("fedpipe_node_micro_batch", key, plan.micro_batch)
        samples.add("fedpipe_node_accumulation", key, plan.accumulation)
        samples.add("fedpipe_node_local_steps", key, plan.local_steps)
        samples.add("fedpipe_node_matrices", key, len(plan.ranks))
        samples.add("fedpipe_node_rank", (*key, "min"), min(plan.ranks.values(), default=None))
        samples.add("fedpipe_node_rank", (*key, "max"), max(plan.ranks.values(), default=None))
        samples.add("fedpipe_node_predicted_memory_bytes", key, plan.predicted_bytes)
        samples.add("fedpipe_node_predicted_step_seconds", key, plan.predicted_step_seconds)
    last = next((n for n in sorted(state.rounds, reverse=True) if node in state.rounds[n].updates), None)
    profile = state.profiles.get(node)
    if last is not None:
        manifest = state.rounds[last].updates[node]
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
