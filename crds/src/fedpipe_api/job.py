# SPDX-License-Identifier: Apache-2.0
"""FedPipeJob: one federated fine-tuning of one language model (`fedpipe.io/v1alpha1`)."""

import re
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, JsonValue, StringConstraints

from .base import Model, ModuleName, Name
from .data_source import DataSource, Fields
from .lora.methods import Method
from .object_url import EXAMPLES, OBJECT_URL_PATTERN
from .objects import (
    Claim,
    HostPath,
    LabelSelector,
    LabelSelectorRequirement,
    ObjectMeta,
    SecretName,
    Volume,
)
from .open_json import check_open_json
from .precisions import AUTO, Precision, Quantization
from .privacy import Privacy
from .rules import IMMUTABLE, Rule, exactly_one, immutable, min_not_above_max
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
from .tracking import Tracking
from .training import (
    Adapter,
    Aggregation,
    Checks,
    Given,
    Optimizer,
    Ranks,
    Robust,
    Rounds,
    Selection,
    ServerOptimizer,
    Until,
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
    "Given",
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
    "Privacy",
    "Ranks",
    "Robust",
    "RoundStatus",
    "Rounds",
    "Selection",
    "ServerOptimizer",
    "Task",
    "Until",
    "Volume",
]

Label = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class Task(StrEnum):
    """What the model is trained to do."""

    SEQUENCE_CLASSIFICATION = "sequence-classification"
    CAUSAL_LM = "causal-lm"


class HuggingFace(Model):
    """A model repository of the Hugging Face hub, pinned to a revision."""

    @property
    def name(self) -> str:
        """REPOSITORY@REVISION, as agents load it."""
        return f"{self.repo}@{self.revision}"

    repo: str = Field(
        min_length=1,
        max_length=256,
        pattern=r"^[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?$",
        description="Repository, such as google-bert/bert-base-uncased.",
    )
    revision: str = Field(
        default="main", min_length=1, max_length=256, description="Commit, tag or branch; pin a commit."
    )
    token_secret: SecretName | None = Field(
        default=None,
        description="For a gated model: Secret of the job's namespace whose key HF_TOKEN is a token of the "
        "hub; `fedpipe run` takes HF_TOKEN from its environment.",
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


class Nodes(Model):
    """Which nodes take part, and how many."""

    selector: LabelSelector = LabelSelector()
    min: int = Field(default=1, ge=1, le=5000, description="Fewer planned nodes than this do not start.")
    max: int = Field(default=100, ge=1, le=5000, description="At most so many take part.")

    rules: ClassVar = (min_not_above_max(), *immutable("selector"))


class Output(Model):
    """Where the finished adapter also goes; the operator always keeps it in its store."""

    volume: Volume | None = None
    url: str | None = Field(
        default=None,
        max_length=2048,
        description=f"Object store: {EXAMPLES}. In a cluster it must be one that the administrator allows.",
    )
    secret_name: SecretName | None = Field(
        default=None,
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


_PRIVACY_RULES = (
    Rule(
        field="data.packing",
        message="packed rows have no gradients of their own, as privacy needs; set packing to false",
        cel="!has(self.privacy) || !has(self.data.packing) || !self.data.packing",
        holds=lambda spec: spec.privacy is None or not spec.data.packing,
    ),
    Rule(
        field="adapter.selection.mode",
        message="importance scores are withheld under privacy; set mode to all, list or random",
        cel="!has(self.privacy) || (has(self.adapter) && has(self.adapter.selection) && "
        "has(self.adapter.selection.mode) && self.adapter.selection.mode != 'importance')",
        holds=lambda spec: spec.privacy is None or spec.adapter.selection.mode != "importance",
    ),
    Rule(
        field="rounds.until",
        message="evaluations are withheld under privacy; remove until",
        cel="!has(self.privacy) || !has(self.rounds.until)",
        holds=lambda spec: spec.privacy is None or spec.rounds.until is None,
    ),
    Rule(
        field="quantization",
        message="int8 of bitsandbytes rounds rows by others of their batch, which privacy forbids; "
        "use auto, none, bf16 or nf4",
        cel="!has(self.privacy) || !has(self.quantization) || self.quantization != 'int8'",
        holds=lambda spec: spec.privacy is None or spec.quantization != Precision.INT8.name,
    ),
)
"""What DP-SGD cannot protect is refused."""


class FedPipeJobSpec(Model):
    """What to train, on which data, on which nodes, for how long."""

    model: ModelSource
    data: DataSource
    nodes: Nodes = Nodes()
    rounds: Rounds
    adapter: Adapter = Adapter()
    quantization: Quantization = Field(
        default=AUTO,
        description="Precision of the frozen base; auto: the highest that leaves room, per node.",
    )
    optimizer: Optimizer = Optimizer()
    aggregation: Aggregation = Aggregation()
    privacy: Privacy | None = None
    output: Output | None = None
    tracking: Tracking | None = None
    seed: int = Field(default=0, ge=0, le=2**31 - 1, description="Seed of all random choices.")
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
        Rule(
            field="data.packing",
            message="sequence-classification has one class per sequence; set packing to false",
            cel="self.model.task == 'causal-lm' || !has(self.data.packing) || !self.data.packing",
            holds=lambda spec: spec.model.task is Task.CAUSAL_LM or not spec.data.packing,
        ),
        Rule(
            field="adapter.from",
            message="needs aggregation.method exact, truncate or stack",
            cel="!has(self.adapter) || !has(self.adapter.from) || !has(self.aggregation) || "
            "!has(self.aggregation.method) || !(self.aggregation.method in ['zero-pad', 'average'])",
            holds=lambda spec: spec.adapter.from_ is None or not spec.aggregation.method.averages_factors,
        ),
        *immutable("model", "data", "adapter", "quantization", "optimizer", "aggregation", "output", "seed"),
        *_PRIVACY_RULES,
        *immutable("tracking", "privacy"),
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
