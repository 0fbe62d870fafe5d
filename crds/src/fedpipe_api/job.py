"""FedPipeJob: one federated fine-tuning of one language model (`fedpipe.io/v1alpha1`)."""

import re
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, JsonValue, StringConstraints

from .base import Duration, Model, ModuleName, Name, Precision
from .object_url import EXAMPLES, OBJECT_URL_PATTERN
from .objects import (
    Claim,
    HostPath,
    LabelSelector,
    LabelSelectorRequirement,
    ObjectMeta,
    Volume,
)
from .open_json import check_open_json
from .rules import IMMUTABLE, Rule, exactly_one, immutable, inside, min_not_above_max
from .status import (
    AdapterStatus,
    FedPipeJobStatus,
    MatrixScore,
    Metric,
    NodeCounts,
    NodeStatus,
    Phase,
    RoundStatus,
)

__all__ = [
    "Adapter",
    "AdapterStatus",
    "Aggregation",
    "Checks",
    "Claim",
    "DataSource",
    "FedPipeJob",
    "FedPipeJobSpec",
    "FedPipeJobStatus",
    "Fields",
    "HostPath",
    "HuggingFace",
    "LabelSelector",
    "LabelSelectorRequirement",
    "MatrixScore",
    "Method",
    "Metric",
    "ModelSource",
    "ModuleName",
    "Name",
    "NodeCounts",
    "NodeStatus",
    "Nodes",
    "ObjectMeta",
    "Optimizer",
    "Output",
    "Phase",
    "Precision",
    "Ranks",
    "RoundStatus",
    "Rounds",
    "Selection",
    "ServerOptimizer",
    "Task",
    "Until",
    "Volume",
]

Label = Annotated[str, StringConstraints(min_length=1, max_length=256)]
ColumnName = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class Task(StrEnum):
    """What the model is trained to do."""

    SEQUENCE_CLASSIFICATION = "sequence-classification"
    CAUSAL_LM = "causal-lm"


class HuggingFace(Model):
    """A model repository of the Hugging Face hub, pinned to a revision."""

    repo: str = Field(
        min_length=1,
        max_length=256,
        pattern=r"^[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?$",
        description="Repository, such as google-bert/bert-base-uncased.",
    )
    revision: str = Field(
        default="main", min_length=1, max_length=256, description="Commit, tag or branch; pin a commit."
    )


def _unique(values: tuple[str, ...]) -> tuple[str, ...]:
    twice = next((value for i, value in enumerate(values) if value in values[:i]), None)
    if twice is not None:
        raise ValueError(f"{twice!r} is given twice")
    return values


class ModelSource(Model):
    """The base model: where it is stored and what it is trained to do."""

    hugging_face: HuggingFace | None = None
    host_path: HostPath | None = None
    persistent_volume_claim: Claim | None = None
    task: Task
    # A set, because CEL cannot compare a thousand labels with each other within its budget.
    labels: Annotated[tuple[Label, ...], AfterValidator(_unique)] = Field(
        default=(),
        max_length=1000,
        json_schema_extra={"x-kubernetes-list-type": "set"},
        description="Class names, in the order of their index; at least two for sequence-classification.",
    )

    rules: ClassVar = (
        exactly_one("huggingFace", "hostPath", "persistentVolumeClaim"),
        Rule(
            field="labels",
            message="sequence-classification needs at least two class names",
            cel="self.task != 'sequence-classification' || (has(self.labels) && size(self.labels) >= 2)",
            holds=lambda model: model.task is not Task.SEQUENCE_CLASSIFICATION or len(model.labels) >= 2,
        ),
        Rule(
            field="labels",
            message="causal-lm has no classes; remove labels",
            cel="self.task != 'causal-lm' || !has(self.labels) || size(self.labels) == 0",
            holds=lambda model: model.task is not Task.CAUSAL_LM or not model.labels,
        ),
        # Sets are equal in any order, but the order of labels is their index.
        Rule(
            field="labels",
            message=f"labels {IMMUTABLE}",
            cel="!has(self.labels) || !has(oldSelf.labels) || "
            "self.labels.join('\\n') == oldSelf.labels.join('\\n')",
        ),
    )


class Fields(Model):
    """Column names of the data: `text` and `label`, or `prompt` and `completion`."""

    text: ColumnName = Field(
        default="text", description="Text to classify, or to continue if there is no prompt."
    )
    label: ColumnName = Field(default="label", description="Class name or index.")
    prompt: ColumnName = Field(default="prompt", description="Part of a sample that is given, not learnt.")
    completion: ColumnName = Field(default="completion", description="Part of a sample that is learnt.")


Encoding = Literal[
    "windows-1250",
    "windows-1251",
    "windows-1252",
    "windows-1253",
    "windows-1254",
    "iso-8859-1",
    "iso-8859-2",
    "iso-8859-15",
    "koi8-r",
    "shift_jis",
    "euc-jp",
    "euc-kr",
    "gb18030",
    "big5",
]


class DataSource(Model):
    """Each node's own data; it never leaves the node."""

    volume: Volume
    train: str = Field(
        min_length=1,
        max_length=1024,
        description="File inside the volume, directory of shards, or glob such as train/*.jsonl.gz.",
    )
    evaluation: str | None = Field(
        default=None,
        min_length=1,
        max_length=1024,
        description="Held-out file, directory or glob; default: a share of train.",
    )
    format: Literal["jsonl", "csv", "parquet", "arrow", "sharegpt", "alpaca"] | None = Field(
        default=None,
        description="Format of the files, default by their suffix; or the layout of their rows: sharegpt "
        "(conversations) or alpaca (instruction, input, output).",
    )
    encoding: Encoding | None = Field(
        default=None,
        description="Encoding of files of text that are not Unicode; UTF-8, UTF-16 and UTF-32 are found.",
    )
    fields: Fields = Fields()
    max_length: int = Field(default=256, ge=8, le=131072, description="Tokens kept of each sample.")
    evaluation_share: float = Field(default=0.1, ge=0, lt=1, description="Share of train held out.")

    rules: ClassVar = (inside("train"), inside("evaluation"))


class Nodes(Model):
    """Which nodes take part, and how many."""

    selector: LabelSelector = LabelSelector()
    min: int = Field(default=1, ge=1, le=5000, description="Fewer planned nodes than this do not start.")
    max: int = Field(default=100, ge=1, le=5000, description="At most so many take part.")

    rules: ClassVar = (min_not_above_max(), *immutable("selector"))


class Until(Model):
    """When to stop before the last round."""

    metric: Literal["accuracy", "loss", "perplexity"] = Field(
        default="loss", description="Accuracy is for sequence-classification."
    )
    reaches: float | None = Field(
        default=None, ge=-1e9, le=1e9, description="Stop once the metric is at least as good."
    )
    patience: int | None = Field(
        default=None, ge=1, le=10000, description="Stop after so many rounds without improvement."
    )

    rules: ClassVar = (
        Rule(
            field="",
            message="give reaches, patience or both",
            cel="has(self.reaches) || has(self.patience)",
            holds=lambda until: until.reaches is not None or until.patience is not None,
        ),
    )


class Rounds(Model):
    """How long to train and when a round closes."""

    count: int = Field(ge=1, le=10000, description="Rounds to train; may grow until the job ends.")
    local_steps: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="Optimizer steps of each node in a round; default: one epoch.",
    )
    local_epochs: float | None = Field(
        default=None,
        gt=0,
        le=1000,
        description="Passes over the node's data in a round, instead of localSteps.",
    )
    batch_size: int = Field(default=16, ge=1, le=65536, description="Samples of one optimizer step.")
    deadline: Duration = Field(
        default="20m",
        validate_default=True,
        description="A round closes at the latest after this, given a quorum.",
    )
    min_updates: int = Field(default=1, ge=1, le=5000, description="Quorum: a round never closes with fewer.")
    until: Until | None = None

    rules: ClassVar = (
        Rule(
            field="localSteps",
            message="give localSteps or localEpochs, not both",
            cel="!has(self.localSteps) || !has(self.localEpochs)",
            holds=lambda rounds: rounds.local_steps is None or rounds.local_epochs is None,
        ),
        Rule(
            field="deadline",
            message="must be between 1s and 720h",
            cel="duration(self.deadline) >= duration('1s') && duration(self.deadline) <= duration('720h')",
            holds=lambda rounds: 1 <= rounds.deadline <= 720 * 3600,
        ),
        Rule(
            field="count",
            message="may grow but not shrink; set suspend to stop a job",
            cel="self.count >= oldSelf.count",
        ),
        *immutable("localSteps", "localEpochs", "batchSize", "minUpdates"),
    )


class Ranks(Model):
    """Bounds of the LoRA rank of any matrix on any node."""

    min: int = Field(default=2, ge=1, le=1024, description="A matrix gets at least this, or is not trained.")
    max: int = Field(default=16, ge=1, le=1024, description="And at most this.")

    rules: ClassVar = (min_not_above_max(),)


class Selection(Model):
    """Which candidate matrices are fine-tuned (METHOD §1)."""

    mode: Literal["importance", "all", "list", "random"] = Field(
        default="importance", description="How matrices are chosen."
    )
    keep: float = Field(
        default=0.5, gt=0, le=1, description="Share of matrices kept by importance or random."
    )
    matrices: tuple[ModuleName, ...] = Field(
        default=(), max_length=10000, description="Full module names, for mode list."
    )
    warmup_steps: int = Field(default=10, ge=1, le=10000, description="Profiling steps on every node.")

    rules: ClassVar = (
        Rule(
            field="matrices",
            message="needed by mode list, and by it only",
            cel="(self.mode == 'list') == (has(self.matrices) && size(self.matrices) > 0)",
            holds=lambda selection: (selection.mode == "list") == bool(selection.matrices),
        ),
    )


class Adapter(Model):
    """The LoRA adapter."""

    modules: tuple[ModuleName, ...] = Field(
        default=(),
        max_length=100,
        description="Module suffixes to adapt; default: attention, by architecture.",
    )
    ranks: Ranks = Ranks()
    alpha: float = Field(default=16.0, gt=0, le=65536, description="LoRA alpha; scale is alpha/r.")
    rs_lora: bool = Field(default=False, description="Scale by alpha/sqrt(r) instead.")
    selection: Selection = Selection()


class Optimizer(Model):
    """AdamW on each node; a fresh one every round."""

    learning_rate: float = Field(default=1e-3, gt=0, le=10, description="Of the first round after warm-up.")
    weight_decay: float = Field(default=0.0, ge=0, le=10, description="Decoupled, as in AdamW.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="Of the learning rate, over the rounds of the job."
    )
    warmup_rounds: int = Field(default=0, ge=0, le=10000, description="Rounds of linear warm-up.")
    max_grad_norm: float = Field(default=1.0, gt=0, le=1e6, description="Gradients are clipped to this norm.")
    proximal: float = Field(default=0.0, ge=0, le=1e6, description="FedProx mu; 0 switches it off.")


class Method(StrEnum):
    """How unequal adapters are aggregated (METHOD §4)."""

    EXACT = "exact"
    ZERO_PAD = "zero-pad"
    AVERAGE = "average"
    TRUNCATE = "truncate"
    STACK = "stack"


class ServerOptimizer(Model):
    """What the server does with the mean change of a round."""

    name: Literal["none", "fedavgm", "fedadam"] = Field(default="none", description="none adds it as it is.")
    learning_rate: float | None = Field(
        default=None, gt=0, le=100, description="Factor of the step; default 1, for fedadam 0.001."
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Of fedavgm and fedadam.")


class Checks(Model):
    """What happens to a suspicious update; non-finite ones are always refused."""

    mode: Literal["none", "flag", "reject"] = Field(default="flag", description="flag reports and counts it.")
    max_norm: float = Field(default=5.0, gt=1, le=1e6, description="Times the running median norm.")
    min_cosine: float = Field(default=-0.5, ge=-1, le=1, description="Median of those to the other updates.")


class Robust(Model):
    """How much of the nodes' influence is kept when some of them are hostile or broken (METHOD §5)."""

    rule: Literal["none", "filtered-mean", "geometric-median", "centered-clipping", "multi-krum"] = Field(
        default="filtered-mean",
        description="filtered-mean is the plain mean as long as no update is an outlier.",
    )
    byzantine: float = Field(
        default=0.2, ge=0, lt=0.5, description="Share of nodes that multi-krum and trimmed-mean leave out."
    )
    head: Literal["mean", "median", "trimmed-mean"] = Field(
        default="mean", description="Of tensors that are trained whole, entry by entry; mean: by the rule."
    )


class Aggregation(Model):
    """How updates become the next global adapter."""

    method: Method = Method.EXACT
    max_global_rank: int = Field(
        default=32, ge=1, le=4096, description="Rank of the global adapter, at most."
    )
    server: ServerOptimizer = ServerOptimizer()
    checks: Checks = Checks()
    robust: Robust = Robust()


class Output(Model):
    """Where the finished adapter also goes; the operator always keeps it in its store."""

    volume: Volume | None = None
    url: str | None = Field(
        default=None,
        max_length=2048,
        description=f"Object store: {EXAMPLES}. In a cluster it must be one that the administrator allows.",
    )
    secret_name: str | None = Field(
        default=None,
        min_length=1,
        max_length=253,
        pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$",
        description="Secret of the job's namespace with the credentials for url; `fedpipe run` takes them "
        "from its environment.",
    )

    rules: ClassVar = (
        Rule(
            field="",
            message="give volume, url or both",
            cel="has(self.volume) || has(self.url)",
            holds=lambda output: output.volume is not None or output.url is not None,
        ),
        Rule(
            field="url",
            message=f"must be a URL of an object store: {EXAMPLES}, with plain path segments",
            cel=f"!has(self.url) || self.url.matches('{OBJECT_URL_PATTERN}')",
            holds=lambda output: (
                output.url is None or re.fullmatch(OBJECT_URL_PATTERN[1:-1], output.url) is not None
            ),
        ),
        Rule(
            field="secretName",
            message="needed by url, and by it only",
            cel="has(self.url) == has(self.secretName)",
            holds=lambda output: (output.url is None) == (output.secret_name is None),
        ),
    )


def _pod_template(template: dict[str, Any]) -> dict[str, Any]:
    for key, value in template.items():
        if key not in ("metadata", "spec"):
            raise ValueError(f"{key}: unknown field; a Pod template has metadata and spec")
        if not isinstance(value, dict):
            raise ValueError(f"{key}: must be an object")
    check_open_json(template)
    return template


_OPEN_OBJECT: dict[str, JsonValue] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}


class FedPipeJobSpec(Model):
    """What to train, on which data, on which nodes, for how long."""

    model: ModelSource
    data: DataSource
    nodes: Nodes = Nodes()
    rounds: Rounds
    adapter: Adapter = Adapter()
    quantization: Literal["auto", "none", "bf16", "int8", "nf4"] = Field(
        default="auto",
        description="Precision of the frozen base; auto: the highest that leaves room, per node.",
    )
    optimizer: Optimizer = Optimizer()
    aggregation: Aggregation = Aggregation()
    output: Output | None = None
    seed: int = Field(default=0, ge=0, le=2**31 - 1, description="Of everything random.")
    suspend: bool = Field(default=False, description="Stop the agents and keep all state; false goes on.")
    ttl_seconds_after_finished: int | None = Field(
        default=None, ge=0, le=2**31 - 1, description="Delete the job so long after its end; default: never."
    )
    active_deadline_seconds: int | None = Field(
        default=None, ge=1, le=2**31 - 1, description="Fail the job so long after its start; default: never."
    )
    pod_template: Annotated[dict[str, Any], AfterValidator(_pod_template)] | None = Field(
        default=None,
        description="A Pod's metadata and spec, merged strategically into every agent Pod.",
        json_schema_extra={"type": "object", "properties": {"metadata": _OPEN_OBJECT, "spec": _OPEN_OBJECT}},
    )

    rules: ClassVar = (
        Rule(
            field="rounds.minUpdates",
            message="{rounds.minUpdates} updates are required but nodes.max is {nodes.max}. "
            "Lower minUpdates or raise nodes.max.",
            cel="self.rounds.minUpdates <= self.nodes.max",
            holds=lambda spec: spec.rounds.min_updates <= spec.nodes.max,
        ),
        Rule(
            field="rounds.until.metric",
            message="causal-lm has no accuracy; use loss or perplexity",
            cel="self.model.task != 'causal-lm' || !has(self.rounds.until) || "
            "self.rounds.until.metric != 'accuracy'",
            holds=lambda spec: (
                not (
                    spec.model.task is Task.CAUSAL_LM
                    and spec.rounds.until
                    and spec.rounds.until.metric == "accuracy"
                )
            ),
        ),
        *immutable("model", "data", "adapter", "quantization", "optimizer", "aggregation", "output", "seed"),
    )


class JobMeta(ObjectMeta):
    """Metadata of a job; its name is also a label value and the start of Pod names."""

    name: str = Field(
        min_length=1,
        max_length=63,
        pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$",
        description="Name of the job.",
    )


class FedPipeJob(Model):
    """One federated fine-tuning."""

    api_version: Literal["fedpipe.io/v1alpha1"] = "fedpipe.io/v1alpha1"
    kind: Literal["FedPipeJob"] = "FedPipeJob"
    metadata: JobMeta
    spec: FedPipeJobSpec
    status: FedPipeJobStatus | None = None

    rules: ClassVar = (
        Rule(
            field="spec.rounds.count",
            message="the job has ended and cannot train on; create another job instead",
            cel="!has(oldSelf.status) || !has(oldSelf.status.phase) || "
            "!(oldSelf.status.phase in ['Succeeded', 'Failed']) || "
            "self.spec.rounds.count == oldSelf.spec.rounds.count",
        ),
    )
