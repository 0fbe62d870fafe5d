# SPDX-License-Identifier: Apache-2.0
"""Changes of a job that runs: pydantic and the API server must agree on which are allowed."""

from contract.manifests import UNSET, Case, job

FULL = job(
    {
        "spec.nodes": {"selector": {"matchLabels": {"site": "edge"}}, "min": 2, "max": 6},
        "spec.rounds": {"count": 30, "localSteps": 50, "minUpdates": 2, "until": {"patience": 5}},
        "spec.output": {"url": "s3://bucket/prefix", "secretName": "writer"},
    }
)
"""A job whose fields the changes below touch."""

ALLOWED_CHANGES = [
    Case("more rounds", {"spec.rounds.count": 31}),
    Case("another target", {"spec.rounds.until": {"metric": "accuracy", "reaches": 0.9}}),
    Case("no target", {"spec.rounds.until": UNSET}),
    Case("another deadline", {"spec.rounds.deadline": "1h"}),
    Case("suspend", {"spec.suspend": True}),
    Case("ttl", {"spec.ttlSecondsAfterFinished": 60}),
    Case("active deadline", {"spec.activeDeadlineSeconds": 60}),
    Case("pod template", {"spec.podTemplate": {"spec": {"priorityClassName": "low"}}}),
    Case("fewer nodes", {"spec.nodes.min": 1, "spec.nodes.max": 3}),
    Case("more nodes", {"spec.nodes.max": 12}),
    Case("a default in words", {"spec.seed": 0, "spec.quantization": "auto"}),
]

FORBIDDEN_CHANGES = [
    Case("fewer rounds", {"spec.rounds.count": 29}, "spec.rounds.count", "may grow but not shrink"),
    Case("other steps", {"spec.rounds.localSteps": 51}, "spec.rounds.localSteps", "localSteps cannot"),
    Case("no steps", {"spec.rounds.localSteps": UNSET}, "spec.rounds.localSteps", "localSteps cannot"),
    Case(
        "epochs instead",
        {"spec.rounds.localSteps": UNSET, "spec.rounds.localEpochs": 1},
        "spec.rounds.localEpochs",
        "localEpochs cannot",
    ),
    Case("other batch", {"spec.rounds.batchSize": 32}, "spec.rounds.batchSize", "batchSize cannot"),
    Case("other quorum", {"spec.rounds.minUpdates": 1}, "spec.rounds.minUpdates", "minUpdates cannot"),
    Case("other model", {"spec.model.huggingFace.revision": "main"}, "spec.model", "model cannot"),
    Case("other labels", {"spec.model.labels": ["a", "b"]}, "spec.model", "model cannot"),
    Case(
        "labels reordered",
        {"spec.model.labels": ["delivery", "billing"]},
        "spec.model.labels",
        "labels cannot",
    ),
    Case("other data", {"spec.data.train": "other.jsonl"}, "spec.data", "data cannot"),
    Case("other ranks", {"spec.adapter.ranks.max": 32}, "spec.adapter", "adapter cannot"),
    Case("other precision", {"spec.quantization": "nf4"}, "spec.quantization", "quantization cannot"),
    Case("other optimizer", {"spec.optimizer.learningRate": 0.1}, "spec.optimizer", "optimizer cannot"),
    Case("other method", {"spec.aggregation.method": "average"}, "spec.aggregation", "aggregation cannot"),
    Case("other output", {"spec.output.url": "s3://other"}, "spec.output", "output cannot"),
    Case("no output", {"spec.output": UNSET}, "spec.output", "output cannot"),
    Case(
        "privacy",
        {"spec.privacy": {"epsilon": 8, "delta": 1e-5}, "spec.adapter.selection.mode": "all"},
        "spec.privacy",
        "privacy cannot",
    ),
    Case("tracking", {"spec.tracking": {"tensorBoard": True}}, "spec.tracking", "tracking cannot"),
    Case("other seed", {"spec.seed": 1}, "spec.seed", "seed cannot"),
    Case(
        "other selector",
        {"spec.nodes.selector.matchLabels": {"a": "b"}},
        "spec.nodes.selector",
        "selector cannot",
    ),
    Case("no selector", {"spec.nodes.selector": UNSET}, "spec.nodes.selector", "selector cannot"),
]
