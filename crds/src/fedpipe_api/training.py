# SPDX-License-Identifier: Apache-2.0
"""How a FedPipeJob trains: its rounds, adapter, optimizer and aggregation."""

from typing import ClassVar, Literal

from pydantic import Field

from .base import Duration, Model, ModuleName
from .lora.methods import Method
from .rules import Rule, exactly_one, immutable, min_not_above_max


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


class Given(Model):
    """An adapter that exists, which round 1 starts from; its base model must be the job's."""

    path: str | None = Field(
        default=None,
        min_length=1,
        max_length=4096,
        description="PEFT directory, for `fedpipe run`; relative to where that is started.",
    )
    job: str | None = Field(
        default=None,
        min_length=1,
        max_length=63,
        pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$",
        description="Job of the same namespace, whose latest adapter it is; in a cluster.",
    )

    rules: ClassVar = (exactly_one("path", "job"),)


class Adapter(Model):
    """The LoRA adapter."""

    from_: Given | None = Field(
        default=None, alias="from", description="An adapter that training starts from; default: none."
    )

    modules: tuple[ModuleName, ...] = Field(
        default=(),
        max_length=100,
        description="Suffixes of the linear layers to adapt; default: peft's for the architecture, else all.",
    )
    ranks: Ranks = Ranks()
    alpha: float = Field(default=16.0, gt=0, le=65536, description="LoRA alpha; scale is alpha/r.")
    rs_lora: bool = Field(default=False, description="Scale by alpha/sqrt(r) instead.")
    selection: Selection = Selection()


class Optimizer(Model):
    """AdamW on each node; a fresh one every round."""

    learning_rate: float = Field(default=1e-3, gt=0, le=10, description="Highest rate, after warm-up.")
    weight_decay: float = Field(default=0.0, ge=0, le=10, description="Decoupled, as in AdamW.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="How the rate changes over the rounds."
    )
    warmup_rounds: int = Field(default=0, ge=0, le=10000, description="Rounds of linear warm-up.")
    max_grad_norm: float = Field(default=1.0, gt=0, le=1e6, description="Gradients are clipped to this norm.")
    proximal: float = Field(default=0.0, ge=0, le=1e6, description="FedProx mu; 0 switches it off.")


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
    max_norm: float = Field(
        default=5.0, gt=1, le=1e6, description="Largest accepted norm of an update, in running median norms."
    )
    min_cosine: float = Field(
        default=-0.5, ge=-1, le=1, description="Least accepted median cosine to the other updates."
    )


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
        default="mean",
        description="How fully trained tensors are averaged, entry by entry; mean follows the rule.",
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
