"""The Grafana dashboards: what each panel asks for."""

from grafana import Panel

JOB = '{namespace=~"$namespace",job=~"$job"}'


def of_job(name: str, **labels: str) -> str:
    """Return the series of a metric for the chosen jobs."""
    more = "".join(f',{key}="{value}"' for key, value in labels.items())
    return name + JOB.replace("}", more + "}")


ROUNDS = [
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
]

_BY_NODE = "max by (namespace, job, node)"
FLEET = [
    Panel(
        "table",
        "Plan and reality",
        [
            (
                f"max by (namespace, job, node, precision, limited_by) ({of_job('fedpipe_node_plan_info')})",
                "planned",
            ),
            (f"{_BY_NODE} ({of_job('fedpipe_node_up')})", "answers"),
            (f"{_BY_NODE} ({of_job('fedpipe_node_matrices')})", "matrices"),
            (f"{_BY_NODE} ({of_job('fedpipe_node_rank', bound='min')})", "rank from"),
            (f"{_BY_NODE} ({of_job('fedpipe_node_rank', bound='max')})", "rank to"),
            (f"{_BY_NODE} ({of_job('fedpipe_node_micro_batch')})", "micro-batch"),
            (f"{_BY_NODE} ({of_job('fedpipe_node_accumulation')})", "accumulation"),
            (f"{_BY_NODE} ({of_job('fedpipe_node_local_steps')})", "steps"),
            (f"{_BY_NODE} ({of_job('fedpipe_node_update_round')})", "last round"),
        ],
        width=24,
        hide=("namespace",),
    ),
    Panel(
        "timeseries",
        "Memory: predicted and measured peak",
        [
            (of_job("fedpipe_node_predicted_memory_bytes"), "{{node}} predicted"),
            (of_job("fedpipe_node_measured_memory_bytes"), "{{node}} measured"),
        ],
        "bytes",
        12,
        low=0,
    ),
    Panel(
        "timeseries",
        "Time of a step: predicted and measured",
        [
            (of_job("fedpipe_node_predicted_step_seconds"), "{{node}} predicted"),
            (of_job("fedpipe_node_measured_step_seconds"), "{{node}} measured"),
        ],
        "s",
        12,
        low=0,
    ),
    Panel(
        "timeseries",
        "Error of the memory model",
        [
            (
                f"{of_job('fedpipe_node_predicted_memory_bytes')} / "
                f"{of_job('fedpipe_node_measured_memory_bytes')} - 1",
                "{{node}}",
            )
        ],
        "percentunit",
        text="Above 0 the plan was careful, below 0 it was short.",
    ),
    Panel(
        "timeseries",
        "Speed",
        [(of_job("fedpipe_node_tokens_per_second"), "{{node}}")],
        "short",
        text="Tokens per second in the present work.",
        low=0,
    ),
    Panel("timeseries", "Step in the present work", [(of_job("fedpipe_node_step"), "{{node}}")], low=0),
    Panel(
        "timeseries",
        "Silence of agents",
        [(of_job("fedpipe_node_silence_seconds"), "{{node}}")],
        "s",
        low=0,
    ),
    Panel(
        "timeseries",
        "Age of capacity reports",
        [("time() - max by (node) (fedpipe_node_last_pass_timestamp_seconds)", "{{node}}")],
        "s",
        text="A node whose report is too old is not planned with.",
        low=0,
    ),
    Panel(
        "timeseries", "Size of updates", [(of_job("fedpipe_node_update_bytes"), "{{node}}")], "bytes", low=0
    ),
    Panel(
        "timeseries",
        "Free memory",
        [('fedpipe_node_memory_bytes{kind="free"}', "{{node}} {{device}}")],
        "bytes",
        12,
        low=0,
    ),
    Panel(
        "table",
        "Capacity",
        [
            ('max by (node, device) (fedpipe_node_memory_bytes{kind="total"})', "memory"),
            ('max by (node, device) (fedpipe_node_memory_bytes{kind="free"})', "free"),
        ],
        "bytes",
        12,
    ),
    Panel(
        "table",
        "Precisions",
        [("max by (node, precision, verified) (fedpipe_node_precision_usable)", "usable")],
        width=12,
    ),
    Panel(
        "table", "Conditions", [("max by (node, type, reason) (fedpipe_node_condition)", "true")], width=12
    ),
]


def _quantiles(name: str) -> list[tuple[str, str]]:
    return [
        (
            f"histogram_quantile({q}, sum by (le) (rate({name}_bucket[$__rate_interval])))",
            f"{round(q * 100)} %",
        )
        for q in (0.5, 0.9, 0.99)
    ]


OPERATOR = [
    Panel("stat", "Jobs", [("fedpipe_operator_jobs > 0", "{{phase}}")], width=8, height=4),
    Panel(
        "stat", "Since the last reconcile", [("max(fedpipe_operator_reconcile_age_seconds)", "")], "s", 8, 4
    ),
    Panel("stat", "Store free", [("min(fedpipe_operator_store_free_bytes)", "")], "bytes", 8, 4),
    Panel(
        "timeseries", "Reconcile latency", _quantiles("fedpipe_operator_reconcile_seconds"), "s", 12, low=0
    ),
    Panel(
        "timeseries",
        "Event loop lag",
        _quantiles("fedpipe_operator_loop_lag_seconds"),
        "s",
        12,
        text="How late what is due is run; near 0 while aggregation works in its own process.",
        low=0,
    ),
    Panel(
        "timeseries",
        "API requests",
        [
            (
                "sum by (verb, code) (rate(fedpipe_operator_api_requests_total[$__rate_interval]))",
                "{{verb}} {{code}}",
            )
        ],
        "reqps",
        12,
        low=0,
    ),
    Panel(
        "timeseries",
        "API errors",
        [
            (
                "sum by (verb, code) "
                '(rate(fedpipe_operator_api_requests_total{code!~"2.."}[$__rate_interval]))',
                "{{verb}} {{code}}",
            )
        ],
        "reqps",
        12,
        text="Code 0: no answer. 404 and 409 are part of normal work.",
        low=0,
    ),
    Panel(
        "timeseries",
        "Store",
        [("fedpipe_operator_store_bytes", "used"), ("fedpipe_operator_store_free_bytes", "free")],
        "bytes",
        12,
        low=0,
    ),
    Panel(
        "timeseries", "Jobs by phase", [("fedpipe_operator_jobs", "{{phase}}")], width=12, stacked=True, low=0
    ),
    Panel(
        "timeseries",
        "Probes: time of a pass",
        [("fedpipe_probe_pass_seconds", "{{node}}")],
        "s",
        12,
        low=0,
    ),
    Panel(
        "timeseries",
        "Probes: writes and failures",
        [
            ("sum by (cause) (rate(fedpipe_probe_writes_total[$__rate_interval]))", "{{cause}}"),
            (
                "sum by (reason) (rate(fedpipe_probe_publish_failures_total[$__rate_interval]))",
                "failed: {{reason}}",
            ),
        ],
        "ops",
        12,
        low=0,
    ),
]

DASHBOARDS = {"rounds": ROUNDS, "fleet": FLEET, "operator": OPERATOR}
