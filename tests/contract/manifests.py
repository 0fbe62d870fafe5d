# SPDX-License-Identifier: Apache-2.0
"""Specs that are right or wrong, in one table: pydantic and the API server must agree on each."""

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

INVALID = [
    # Types, bounds and closed objects.
    Case("unknown field", {"spec.rouds": {}}, "spec.rouds", "unknown field"),
    Case("unknown nested field", {"spec.rounds.step": 3}, "spec.rounds.step", "unknown field"),
    Case("python's spelling", {"spec.rounds.local_steps": 3}, "spec.rounds.local_steps", "unknown field"),
    Case("no model", {"spec.model": UNSET}, "spec.model"),
    Case("no rounds", {"spec.rounds": UNSET}, "spec.rounds"),
    Case("no task", {"spec.model.task": UNSET}, "spec.model.task"),
    Case("no train file", {"spec.data.train": UNSET}, "spec.data.train"),
    Case("rounds 0", {"spec.rounds.count": 0}, "spec.rounds.count"),
    Case("too many rounds", {"spec.rounds.count": 10001}, "spec.rounds.count"),
    Case("rounds as text", {"spec.rounds.count": "many"}, "spec.rounds.count"),
    Case("half a round", {"spec.rounds.count": 1.5}, "spec.rounds.count"),
    Case("no steps", {"spec.rounds.localSteps": 0}, "spec.rounds.localSteps"),
    Case("no epochs", {"spec.rounds.localEpochs": 0}, "spec.rounds.localEpochs"),
    Case("deadline without unit", {"spec.rounds.deadline": "300"}, "spec.rounds.deadline"),
    Case("deadline as number", {"spec.rounds.deadline": 300}, "spec.rounds.deadline"),
    Case("negative deadline", {"spec.rounds.deadline": "-5m"}, "spec.rounds.deadline"),
    Case("deadline with line end", {"spec.rounds.deadline": "5m\n"}, "spec.rounds.deadline", rule="server"),
    Case("overlong deadline", {"spec.rounds.deadline": "1s" * 17}, "spec.rounds.deadline"),
    Case("unknown task", {"spec.model.task": "translation"}, "spec.model.task"),
    Case(
        "unknown metric", {"spec.rounds.until": {"metric": "bleu", "patience": 1}}, "spec.rounds.until.metric"
    ),
    Case("unknown precision", {"spec.quantization": "int4"}, "spec.quantization"),
    Case("unknown method", {"spec.aggregation.method": "mean"}, "spec.aggregation.method"),
    Case("rank 0", {"spec.adapter.ranks.min": 0}, "spec.adapter.ranks.min"),
    Case("keep nothing", {"spec.adapter.selection.keep": 0}, "spec.adapter.selection.keep"),
    Case("learning rate 0", {"spec.optimizer.learningRate": 0}, "spec.optimizer.learningRate"),
    Case("evaluate on all", {"spec.data.evaluationShare": 1}, "spec.data.evaluationShare"),
    Case("short sequences", {"spec.data.maxLength": 4}, "spec.data.maxLength"),
    Case("unknown format", {"spec.data.format": "xml"}, "spec.data.format"),
    Case("repository path", {"spec.model.huggingFace.repo": "../secret/a"}, "spec.model.huggingFace.repo"),
    Case("claim name", {"spec.data.volume.persistentVolumeClaim.claimName": "a b"}, "claimName"),
    Case("too many labels", {"spec.model.labels": [str(i) for i in range(1001)]}, "spec.model.labels"),
    Case("empty label", {"spec.model.labels": ["a", ""]}, "spec.model.labels[1]"),
    Case("long label", {"spec.model.labels": ["a", "b" * 257]}, "spec.model.labels[1]"),
    Case("label given twice", {"spec.model.labels": ["a", "b", "a"]}, "spec.model.labels", rule="server"),
    Case(
        "long selector value",
        {"spec.nodes.selector.matchLabels": {"a": "b" * 64}},
        "spec.nodes.selector.matchLabels.a",
    ),
    Case("negative seed", {"spec.seed": -1}, "spec.seed"),
    Case("suspend as text", {"spec.suspend": "later"}, "spec.suspend"),
    Case("negative ttl", {"spec.ttlSecondsAfterFinished": -1}, "spec.ttlSecondsAfterFinished"),
    Case("pod template field", {"spec.podTemplate": {"containers": []}}, "containers", "unknown field"),
    Case("pod template text", {"spec.podTemplate": {"spec": "a"}}, "spec.podTemplate"),
    Case("name with dots", {"metadata.name": "a.b"}, "metadata.name"),
    Case("long name", {"metadata.name": "a" * 64}, "metadata.name"),
    # Rules across fields.
    Case("no source", {"spec.model.huggingFace": UNSET}, "spec.model", "exactly one", "cel"),
    Case("two sources", {"spec.model.hostPath": {"path": "/m"}}, "spec.model", "exactly one", "cel"),
    Case("no volume", {"spec.data.volume": {}}, "spec.data.volume", "exactly one", "cel"),
    Case(
        "two volumes", {"spec.data.volume.hostPath": {"path": "/d"}}, "spec.data.volume", "exactly one", "cel"
    ),
    Case("one label", {"spec.model.labels": ["a"]}, "spec.model.labels", "at least two", "cel"),
    Case("no labels", {"spec.model.labels": UNSET}, "spec.model.labels", "at least two", "cel"),
    Case("causal lm with labels", {"spec.model.task": "causal-lm"}, "spec.model.labels", "no classes", "cel"),
    Case(
        "absolute train file",
        {"spec.data.train": "/etc/passwd"},
        "spec.data.train",
        "leaves the volume",
        "cel",
    ),
    Case("train file above", {"spec.data.train": "a/../../b"}, "spec.data.train", "leaves the volume", "cel"),
    Case(
        "evaluation file above",
        {"spec.data.evaluation": ".."},
        "spec.data.evaluation",
        "leaves the volume",
        "cel",
    ),
    Case(
        "claim path above",
        {"spec.data.volume.persistentVolumeClaim.path": "../other"},
        "spec.data.volume.persistentVolumeClaim.path",
        "leaves the volume",
        "cel",
    ),
    Case(
        "nodes crossed",
        {"spec.nodes": {"min": 5, "max": 4}},
        "spec.nodes",
        "min must not be above max",
        "cel",
    ),
    Case(
        "nodes crossed by default",
        {"spec.nodes": {"min": 101}},
        "spec.nodes",
        "min must not be above max",
        "cel",
    ),
    Case(
        "ranks crossed",
        {"spec.adapter.ranks": {"min": 8, "max": 4}},
        "spec.adapter.ranks",
        "min must not be",
        "cel",
    ),
    Case(
        "from a directory and a job",
        {"spec.adapter.from": {"path": "a", "job": "b"}},
        "spec.adapter.from",
        "give exactly one of path, job",
        "cel",
    ),
    Case(
        "from an adapter that is averaged by factors",
        {"spec.adapter.from": {"job": "b"}, "spec.aggregation.method": "zero-pad"},
        "spec.adapter.from",
        "needs aggregation.method exact, truncate or stack",
        "cel",
    ),
    Case("token in a Secret of no name", {"spec.model.huggingFace.tokenSecret": "Hub"}, "tokenSecret"),
    Case(
        "ranks crossed by default",
        {"spec.adapter.ranks.min": 32},
        "spec.adapter.ranks",
        "min must not be",
        "cel",
    ),
    Case(
        "quorum above nodes",
        {"spec.rounds.minUpdates": 5, "spec.nodes.max": 4},
        "spec.rounds.minUpdates",
        "5 updates are required but nodes.max is 4. Lower minUpdates or raise nodes.max.",
        "cel",
    ),
    Case(
        "quorum above nodes by default",
        {"spec.rounds.minUpdates": 101},
        "spec.rounds.minUpdates",
        "101 updates are required but nodes.max is 100",
        "cel",
    ),
    Case(
        "steps and epochs",
        {"spec.rounds.localSteps": 5, "spec.rounds.localEpochs": 1},
        "spec.rounds.localSteps",
        "not both",
        "cel",
    ),
    Case("deadline 0", {"spec.rounds.deadline": "0s"}, "spec.rounds.deadline", "between 1s and 720h", "cel"),
    Case("deadline too short", {"spec.rounds.deadline": "999ms"}, "spec.rounds.deadline", "between", "cel"),
    Case("deadline too long", {"spec.rounds.deadline": "720h1s"}, "spec.rounds.deadline", "between", "cel"),
    Case("until nothing", {"spec.rounds.until": {}}, "spec.rounds.until", "reaches, patience", "cel"),
    Case(
        "accuracy of a causal lm",
        CAUSAL | {"spec.rounds.until": {"metric": "accuracy", "reaches": 1}},
        "spec.rounds.until.metric",
        "no accuracy",
        "cel",
    ),
    Case(
        "list without matrices",
        {"spec.adapter.selection.mode": "list"},
        "spec.adapter.selection.matrices",
        "mode list",
        "cel",
    ),
    Case(
        "matrices without list",
        {"spec.adapter.selection.matrices": ["a"]},
        "spec.adapter.selection.matrices",
        "mode list",
        "cel",
    ),
    Case("output nowhere", {"spec.output": {}}, "spec.output", "volume, url", "cel"),
    *[
        Case(
            f"output to {url!r}",
            {"spec.output": {"url": url, "secretName": "writer"}},
            "spec.output.url",
            "must be a URL of an object store",
            "cel",
        )
        for url in (
            "",
            "bucket/prefix",
            "file:///var/lib/fedpipe/blobs/temp",
            "http://169.254.169.254/latest",
            "https://bucket.s3.amazonaws.com/a",
            "webhdfs://host:9870/a",
            "reference::http://host/a",
            "simplecache::s3://bucket/a",
            "s3://bucket/a::http://host",
            "s3://user:password@bucket/a",
            "s3://host:9000/bucket",
            "s3://bucket/../other",
            "s3://bucket/a/..",
            "s3://bucket/./a",
            "s3://bucket//a",
            "s3://bucket/a%2F..%2Fb",
            "s3://bucket/a?endpoint=http://host",
            "s3://bucket/a#b",
            "s3://bucket/a b",
            "s3://bucket/a\n",
            "s3://bucket/\u2024\u2024/a",
            "S3://bucket/a",
            "s3://Bucket/a",
            "s3://",
            "s3:///a",
            "az://account",
            "local://tmp",
        )
    ],
    Case(
        "output without Secret",
        {"spec.output": {"url": "s3://bucket"}},
        "spec.output.secretName",
        "needed by url",
        "cel",
    ),
    Case(
        "Secret without output",
        {"spec.output": {"volume": {"persistentVolumeClaim": CLAIM}, "secretName": "writer"}},
        "spec.output.secretName",
        "needed by url",
        "cel",
    ),
    Case(
        "Secret of another namespace",
        {"spec.output": {"url": "s3://bucket", "secretName": "other/writer"}},
        "spec.output.secretName",
    ),
    Case(
        "in without values",
        {"spec.nodes.selector.matchExpressions": [{"key": "a", "operator": "In"}]},
        "spec.nodes.selector.matchExpressions[0].values",
        "In and NotIn",
        "cel",
    ),
    Case(
        "exists with values",
        {"spec.nodes.selector.matchExpressions": [{"key": "a", "operator": "Exists", "values": ["b"]}]},
        "spec.nodes.selector.matchExpressions[0].values",
        "In and NotIn",
        "cel",
    ),
    Case(
        "long selector key",
        {"spec.nodes.selector.matchLabels": {"k" * 318: "a"}},
        "spec.nodes.selector.matchLabels",
        "at most 317",
        "cel",
    ),
]

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
    Case("other seed", {"spec.seed": 1}, "spec.seed", "seed cannot"),
    Case(
        "other selector",
        {"spec.nodes.selector.matchLabels": {"a": "b"}},
        "spec.nodes.selector",
        "selector cannot",
    ),
    Case("no selector", {"spec.nodes.selector": UNSET}, "spec.nodes.selector", "selector cannot"),
]
