# SPDX-License-Identifier: Apache-2.0
"""The smallest job, changes to it, and specs that pydantic and the API server must both accept."""

from copy import deepcopy
from typing import Any, NamedTuple

UNSET = object()

JOB: dict[str, Any] = {
    "apiVersion": "fedpipe.io/v1alpha1",
    "kind": "FedPipeJob",
    "metadata": {"name": "tickets", "namespace": "default"},
    "spec": {
        "model": {
            "huggingFace": {"repo": "google-bert/bert-base-uncased", "revision": "86b5e093"},
            "task": "sequence-classification",
            "labels": ["billing", "delivery"],
        },
        "data": {
            "volume": {"persistentVolumeClaim": {"claimName": "tickets-{node}"}},
            "train": "train.jsonl",
        },
        "rounds": {"count": 30},
    },
}
"""The smallest job."""


def job(changes: dict[str, Any], base: dict[str, Any] = JOB) -> dict[str, Any]:
    """Return a copy of the job with values set, or removed by UNSET, at dotted paths."""
    document = deepcopy(base)
    for path, value in changes.items():
        *parents, last = path.split(".")
        place = document
        for name in parents:
            place = place.setdefault(name, {})
        if value is UNSET:
            del place[last]
        else:
            place[last] = value
    return document


class Case(NamedTuple):
    """Changes to the smallest job; `field` and `text` are what a refusal must name, None where it is valid.

    `rule` is the source of the refusal: the schema's types and bounds, CEL, or what the API server knows and
    JSON Schema does not (sets, ends of lines).
    """

    name: str
    changes: dict[str, Any]
    field: str | None = None
    text: str = ""
    rule: str = "schema"


CAUSAL = {"spec.model.task": "causal-lm", "spec.model.labels": UNSET}
CLAIM = {"claimName": "models"}

VALID = [
    Case("smallest", {}),
    Case("causal lm", CAUSAL),
    Case("packed rows", CAUSAL | {"spec.data.packing": True}),
    Case("a classifier without packing", {"spec.data.packing": False}),
    Case(
        "causal lm with perplexity", CAUSAL | {"spec.rounds.until": {"metric": "perplexity", "reaches": 12.5}}
    ),
    Case("accuracy", {"spec.rounds.until": {"metric": "accuracy", "reaches": 0.93, "patience": 5}}),
    Case("patience alone", {"spec.rounds.until": {"patience": 5}}),
    Case(
        "model from host path",
        {"spec.model.huggingFace": UNSET, "spec.model.hostPath": {"path": "/models/b"}},
    ),
    Case(
        "model from claim",
        {"spec.model.huggingFace": UNSET, "spec.model.persistentVolumeClaim": CLAIM | {"path": "a/b"}},
    ),
    Case("data from host path", {"spec.data.volume": {"hostPath": {"path": "/srv/tickets"}}}),
    Case(
        "data in a folder", {"spec.data.train": "a/..b/train.csv", "spec.data.evaluation": "./held-out.csv"}
    ),
    Case("local epochs", {"spec.rounds.localEpochs": 0.5}),
    Case("local steps", {"spec.rounds.localSteps": 50}),
    Case("deadlines", {"spec.rounds.deadline": "1h30m"}),
    Case("fractional deadline", {"spec.rounds.deadline": "1.5h"}),
    Case("shortest deadline", {"spec.rounds.deadline": "1000ms"}),
    Case("longest deadline", {"spec.rounds.deadline": "720h"}),
    Case("quorum equals nodes", {"spec.rounds.minUpdates": 4, "spec.nodes": {"min": 4, "max": 4}}),
    Case("from a directory", {"spec.adapter.from": {"path": "runs/first/adapter"}}),
    Case("from a job", {"spec.adapter.from": {"job": "first"}, "spec.aggregation.method": "truncate"}),
    Case("gated model", {"spec.model.huggingFace.tokenSecret": "hub.token"}),
    Case("one rank", {"spec.adapter.ranks": {"min": 8, "max": 8}}),
    Case("listed matrices", {"spec.adapter.selection": {"mode": "list", "matrices": ["encoder.0.query"]}}),
    Case("all matrices", {"spec.adapter.selection.mode": "all"}),
    Case("no update checks", {"spec.aggregation.checks.mode": "none"}),
    Case("server optimizer", {"spec.aggregation.server": {"name": "fedadam", "learningRate": 0.1}}),
    Case("output to a claim", {"spec.output.volume": {"persistentVolumeClaim": CLAIM}}),
    Case("output to a URL", {"spec.output": {"url": "s3://bucket/prefix", "secretName": "writer"}}),
    Case("output to Google", {"spec.output": {"url": "gs://buc_ket.example", "secretName": "writer"}}),
    Case("output to Azure", {"spec.output": {"url": "az://account/container/a/", "secretName": "a.b"}}),
    Case(
        "output to a partition",
        {"spec.output": {"url": "s3://bucket/day=2027-01-01/a.b~1+2_", "secretName": "writer"}},
    ),
    Case(
        "privacy",
        {"spec.privacy": {"epsilon": 8, "delta": 1e-5}, "spec.adapter.selection.mode": "all"},
    ),
    Case("TensorBoard", {"spec.tracking": {"tensorBoard": True}}),
    Case(
        "TensorBoard in a cluster",
        {"spec.tracking": {"tensorBoard": True, "volume": {"persistentVolumeClaim": CLAIM}}},
    ),
    Case(
        "MLflow with a login",
        {"spec.tracking": {"mlflow": {"uri": "https://mlflow.lab", "secretName": "mlflow"}}},
    ),
    Case(
        "MLflow's server",
        {"spec.tracking": {"mlflow": {"uri": "https://mlflow.lab:5000/a", "experiment": "x"}}},
    ),
    Case("MLflow's files", {"spec.tracking": {"tensorBoard": False, "mlflow": {"uri": "file:///srv/runs"}}}),
    Case("selector", {"spec.nodes.selector": {"matchLabels": {"site": "edge", "fedpipe.io/gpu": ""}}}),
    Case(
        "selector expressions",
        {
            "spec.nodes.selector.matchExpressions": [
                {"key": "site", "operator": "In", "values": ["a", "b"]},
                {"key": "gpu", "operator": "Exists"},
            ]
        },
    ),
    Case(
        "pod template",
        {"spec.podTemplate": {"metadata": {"labels": {"a": "b"}}, "spec": {"tolerations": []}}},
    ),
    Case("time limits", {"spec.ttlSecondsAfterFinished": 0, "spec.activeDeadlineSeconds": 1}),
    Case("suspended", {"spec.suspend": True}),
    Case("a thousand labels", {"spec.model.labels": [f"class {i}" for i in range(1000)]}),
    Case("longest name", {"metadata.name": "a" * 63}),
]
