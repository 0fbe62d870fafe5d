# SPDX-License-Identifier: Apache-2.0
"""Dashboard Rounds: how a job learns."""

from grafana import Panel

from dashboards.series import of_job

PANELS = [
    Panel(
        "stat", "Phase", [(f"{of_job('fedpipe_job_phase')} == 1", "{{phase}}")], width=4, height=4, names=True
    ),
    Panel(
        "stat",
        "Rounds",
        [
            (of_job("fedpipe_job_rounds", kind="done"), "done"),
            (of_job("fedpipe_round_open"), "open"),
            (of_job("fedpipe_job_rounds", kind="wanted"), "wanted"),
        ],
        width=4,
        height=4,
    ),
    Panel("stat", "Best metric", [(of_job("fedpipe_job_best_metric"), "{{metric}}")], width=4, height=4),
    Panel("stat", "Time left", [(of_job("fedpipe_job_eta_seconds"), "{{job}}")], "s", 4, 4),
    Panel(
        "stat",
        "Nodes",
        [(of_job("fedpipe_job_nodes", kind=kind), kind) for kind in ("ready", "planned")],
        width=4,
        height=4,
    ),
    Panel(
        "stat",
        "Under-training",
        [(of_job("fedpipe_job_under_training_ratio"), "{{job}}")],
        "percentunit",
        4,
        4,
        "Share of planned local steps that were not done when rounds closed.",
    ),
    Panel(
        "timeseries",
        "Evaluation loss",
        [(of_job("fedpipe_job_loss"), "{{job}}")],
        text="Of the global adapter on every node's held-out share, after the latest evaluated round.",
    ),
    Panel(
        "timeseries",
        "Accuracy",
        [(of_job("fedpipe_job_accuracy_ratio"), "{{job}}")],
        "percentunit",
        text="Classification only.",
    ),
    Panel(
        "timeseries",
        "Participation",
        [
            (of_job("fedpipe_round_participants"), "participants"),
            (of_job("fedpipe_round_updates"), "updates"),
            (of_job("fedpipe_job_nodes", kind="ready"), "answering"),
            (of_job("fedpipe_job_nodes", kind="required"), "required"),
        ],
        low=0,
    ),
    Panel(
        "timeseries",
        "Time of a round",
        [
            (
                f"{of_job('fedpipe_round_seconds')} - {of_job('fedpipe_round_aggregation_seconds')}",
                "training and transfer",
            ),
            (of_job("fedpipe_round_aggregation_seconds"), "aggregation"),
        ],
        "s",
        stacked=True,
        low=0,
    ),
    Panel(
        "timeseries",
        "Open round",
        [
            (of_job("fedpipe_round_open_seconds"), "open for"),
            (of_job("fedpipe_round_deadline_seconds"), "left until the deadline"),
        ],
        "s",
    ),
    Panel(
        "timeseries",
        "Traffic",
        [
            (f"rate({of_job('fedpipe_job_bytes_up_total')}[$__rate_interval])", "up"),
            (f"rate({of_job('fedpipe_job_bytes_down_total')}[$__rate_interval])", "down"),
        ],
        "Bps",
        low=0,
    ),
    Panel(
        "timeseries",
        "Stragglers, replans, suspicious updates",
        [
            (of_job("fedpipe_job_stragglers_total"), "stragglers"),
            (of_job("fedpipe_job_replans_total"), "replans"),
            (of_job("fedpipe_job_suspicious_updates_total"), "{{verdict}}"),
        ],
        low=0,
    ),
    Panel(
        "timeseries",
        "Aggregation error",
        [
            (of_job("fedpipe_round_relative_error"), "against the exact sum"),
            (of_job("fedpipe_round_discarded_energy_ratio"), "energy lost to maxGlobalRank"),
        ],
        "percentunit",
        low=0,
    ),
    Panel("timeseries", "Effective rank", [(of_job("fedpipe_round_effective_rank"), "{{job}}")], low=0),
    Panel("timeseries", "Update norm", [(of_job("fedpipe_node_update_norm"), "{{node}}")], low=0),
    Panel(
        "timeseries",
        "Cosine to the other updates",
        [(of_job("fedpipe_node_update_cosine"), "{{node}}")],
        text="Near -1: a node that pulls the other way; look at its data and hardware.",
    ),
    Panel("timeseries", "Training loss by node", [(of_job("fedpipe_node_train_loss"), "{{node}}")]),
    Panel(
        "table",
        "Importance of weight matrices",
        [(f"topk(20, {of_job('fedpipe_job_importance')})", "score")],
        width=16,
        hide=("namespace", "job"),
    ),
    Panel(
        "timeseries", "Global adapter", [(of_job("fedpipe_round_adapter_bytes"), "{{job}}")], "bytes", low=0
    ),
    Panel(
        "timeseries",
        "Privacy budget spent",
        [(of_job("fedpipe_node_epsilon"), "{{node}}")],
        width=24,
        text="Epsilon of each node's rows; only of jobs with spec.privacy, which end before they exceed it.",
        low=0,
    ),
]
