# SPDX-License-Identifier: Apache-2.0
"""Dashboard Operator: the operator's own health, its store, and the probes."""

from grafana import Panel


def _quantiles(name: str) -> list[tuple[str, str]]:
    return [
        (
            f"histogram_quantile({q}, sum by (le) (rate({name}_bucket[$__rate_interval])))",
            f"{round(q * 100)} %",
        )
        for q in (0.5, 0.9, 0.99)
    ]


PANELS = [
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
        "Objects left out",
        [("fedpipe_operator_unreadable_objects", "{{kind}}")],
        width=12,
        text="Nodes, FedPipeNodes and Pods that cannot be read; the operator's log names the field.",
        low=0,
    ),
    Panel(
        "timeseries",
        "Jobs set aside",
        [
            ("fedpipe_operator_quarantined_jobs", "quarantined"),
            ("fedpipe_operator_unmeasured_jobs", "not measured"),
        ],
        width=12,
        text="Quarantined: a record in the ledger cannot be read; the job's status names it and what to do.",
        low=0,
    ),
    Panel(
        "timeseries",
        "Background work that failed",
        [("sum by (task) (rate(fedpipe_operator_task_failures_total[$__rate_interval]))", "{{task}}")],
        width=12,
        text="It is started again each time; what fails again and again makes the operator not ready.",
        low=0,
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
