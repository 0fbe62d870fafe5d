# SPDX-License-Identifier: Apache-2.0
"""Every metric of the operator as data: the collector offers no others; documents are made from it."""

from dataclasses import dataclass
from typing import Literal

JOB = ("namespace", "job")
NODE = (*JOB, "node")


@dataclass(frozen=True)
class Family:
    """One metric. A counter's name ends in _total."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    labels: tuple[str, ...]
    help: str


def _gauge(name: str, labels: tuple[str, ...], text: str) -> Family:
    return Family(name, "gauge", labels, text)


def _counter(name: str, labels: tuple[str, ...], text: str) -> Family:
    return Family(name, "counter", labels, text)


FAMILIES: tuple[Family, ...] = (
    # A job, from its submission to its deletion
    _gauge("fedpipe_job_phase", (*JOB, "phase"), "1 for the phase the job is in, 0 for the others."),
    _gauge("fedpipe_job_info", (*JOB, "task", "method"), "1; what is trained and how it is aggregated."),
    _gauge("fedpipe_job_submitted_timestamp_seconds", JOB, "Unix time of the submission."),
    _gauge("fedpipe_job_finished_timestamp_seconds", JOB, "Unix time of the end; absent before."),
    _gauge("fedpipe_job_rounds", (*JOB, "kind"), "Rounds by kind: done, wanted."),
    _gauge(
        "fedpipe_job_nodes",
        (*JOB, "kind"),
        "Nodes by kind: offered, planned, ready, lost, left_out, required (quorum).",
    ),
    _gauge("fedpipe_job_eta_seconds", JOB, "Seconds to the last round at the recent pace."),
    _gauge("fedpipe_job_loss", JOB, "Evaluation loss (natural log) of the latest evaluated round."),
    _gauge("fedpipe_job_accuracy_ratio", JOB, "Accuracy of the latest evaluated round."),
    _gauge("fedpipe_job_evaluated_round", JOB, "Round that loss and accuracy are of."),
    _gauge(
        "fedpipe_job_best_metric", (*JOB, "metric"), "Best value so far of the metric the job is judged by."
    ),
    _gauge("fedpipe_job_importance", (*JOB, "matrix", "selected"), "Importance of the 100 highest matrices."),
    _gauge(
        "fedpipe_job_under_training_ratio", JOB, "Share of planned local steps not done when rounds closed."
    ),
    _gauge("fedpipe_job_epsilon", JOB, "Privacy budget spent: the largest of its nodes'."),
    _counter("fedpipe_job_updates_total", JOB, "Updates counted."),
    _counter(
        "fedpipe_job_suspicious_updates_total", (*JOB, "verdict"), "Updates clipped, flagged or rejected."
    ),
    _counter("fedpipe_job_stragglers_total", JOB, "Times a participant had no update when its round closed."),
    _counter("fedpipe_job_replans_total", JOB, "Plans made after the first."),
    _counter("fedpipe_job_bytes_up_total", JOB, "Bytes of counted updates."),
    _counter("fedpipe_job_bytes_down_total", JOB, "Bytes of adapters sent in closed rounds."),
    # Its rounds
    _gauge("fedpipe_round_open", JOB, "Number of the open round; 0 when none is."),
    _gauge("fedpipe_round_open_seconds", JOB, "Seconds the open round has been open."),
    _gauge("fedpipe_round_deadline_seconds", JOB, "Seconds to the open round's deadline; negative after it."),
    _gauge("fedpipe_round_participants", JOB, "Participants of the latest round."),
    _gauge("fedpipe_round_updates", JOB, "Updates counted in the latest round."),
    _gauge("fedpipe_round_seconds", JOB, "Duration of the latest aggregated round."),
    _gauge("fedpipe_round_aggregation_seconds", JOB, "Time its aggregation took."),
    _gauge("fedpipe_round_relative_error", JOB, "Its aggregate's error against the exact weighted sum."),
    _gauge("fedpipe_round_discarded_energy_ratio", JOB, "Energy it lost to aggregation.maxGlobalRank."),
    _gauge("fedpipe_round_effective_rank", JOB, "Mean effective rank of the global adapter after it."),
    _gauge("fedpipe_round_adapter_bytes", JOB, "Bytes of the global adapter after it."),
    # A node's part in a job
    _gauge("fedpipe_node_up", NODE, "1 while the node's agent answers."),
    _gauge("fedpipe_node_silence_seconds", NODE, "Seconds since its agent last called."),
    _gauge(
        "fedpipe_node_rows",
        (*NODE, "kind"),
        "Rows of its data that were skipped, truncated, repeated (also train data) or numbered (class).",
    ),
    _gauge("fedpipe_node_plan_info", (*NODE, "precision", "limited_by"), "1; its plan."),
    _gauge("fedpipe_node_micro_batch", NODE, "Planned samples of one forward pass."),
    _gauge("fedpipe_node_accumulation", NODE, "Planned forward passes of one optimizer step."),
    _gauge("fedpipe_node_local_steps", NODE, "Planned optimizer steps of a round."),
    _gauge("fedpipe_node_matrices", NODE, "Matrices it trains."),
    _gauge("fedpipe_node_rank", (*NODE, "bound"), "Lowest (min) and highest (max) rank it trains."),
    _gauge("fedpipe_node_predicted_memory_bytes", NODE, "Planned peak memory."),
    _gauge("fedpipe_node_measured_memory_bytes", NODE, "Peak memory of its latest update or profile."),
    _gauge("fedpipe_node_predicted_step_seconds", NODE, "Planned time of a step."),
    _gauge("fedpipe_node_measured_step_seconds", NODE, "Time of a step in its latest update or profile."),
    _gauge("fedpipe_node_step", NODE, "Step it is at in its present work."),
    _gauge("fedpipe_node_tokens_per_second", NODE, "Its speed in its present work."),
    _gauge("fedpipe_node_train_loss", NODE, "Mean training loss of its latest update."),
    _gauge("fedpipe_node_epsilon", NODE, "Privacy budget that its rows have spent."),
    _gauge("fedpipe_node_update_round", NODE, "Round of its latest update."),
    _gauge("fedpipe_node_update_bytes", NODE, "Bytes of its latest update."),
    _gauge("fedpipe_node_update_norm", NODE, "Frobenius norm of its latest aggregated update."),
    _gauge("fedpipe_node_update_cosine", NODE, "Cosine of that update to the mean of the others."),
    # The operator itself
    Family("fedpipe_operator_reconcile_seconds", "histogram", (), "Duration of one reconciliation of a job."),
    _gauge("fedpipe_operator_reconcile_age_seconds", (), "Seconds since any job was last reconciled."),
    Family("fedpipe_operator_loop_lag_seconds", "histogram", (), "How late the event loop runs what is due."),
    _counter(
        "fedpipe_operator_api_requests_total",
        ("verb", "code"),
        "API requests other than kopf's; code 0 had no answer.",
    ),
    _gauge(
        "fedpipe_operator_unreadable_objects",
        ("kind",),
        "Objects of the cluster that cannot be read and are left out; the log names the field.",
    ),
    _gauge(
        "fedpipe_operator_quarantined_jobs",
        (),
        "Jobs that stand still because a record of theirs cannot be read; their status names it.",
    ),
    _gauge(
        "fedpipe_operator_unmeasured_jobs",
        (),
        "Jobs left out of this scrape because their figures cannot be computed; the log names them.",
    ),
    _counter(
        "fedpipe_operator_task_failures_total",
        ("task",),
        "Failures of background work by kind; it is started again each time.",
    ),
    _gauge("fedpipe_operator_store_bytes", (), "Bytes of blobs in the store."),
    _gauge("fedpipe_operator_store_free_bytes", (), "Bytes free on the store's volume."),
    _gauge("fedpipe_operator_jobs", ("phase",), "Jobs by phase."),
)

NAMES = {family.name: family for family in FAMILIES}


def markdown() -> str:
    """Return the table of all metrics for the documentation."""
    rows = [
        f"| `{family.name}` | {family.kind} | {', '.join(family.labels) or '–'} | {family.help} |"
        for family in FAMILIES
    ]
    return "\n".join(["| metric | type | labels | meaning |", "|---|---|---|---|", *rows])
