# SPDX-License-Identifier: Apache-2.0
"""Dashboard Fleet: what each node can carry, was given, and does."""

from grafana import Panel

from dashboards.series import of_job

_BY_NODE = "max by (namespace, job, node)"
PANELS = [
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
        "table",
        "Rows of the data",
        [(f"max by (namespace, job, node, kind) ({of_job('fedpipe_node_rows')})", "rows")],
        width=24,
        text="Rows of a node's data that were skipped or cut, come twice, or have a number as label.",
        hide=("namespace",),
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
