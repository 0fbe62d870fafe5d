# SPDX-License-Identifier: Apache-2.0
"""What agents and the coordinator say to each other: JSON control messages and tensor names.

Protocol (HTTP; every call is idempotent):
`GET /v1/job` AgentConfig · `POST /v1/agents` Registration -> AgentConfig ·
`GET /v1/assignment?wait=S` -> Assignment or 204 ·
`POST /v1/profile` ProfileReport · `GET /v1/blobs/{sha256}` (Range) ·
`POST /v1/rounds/{n}/evaluation` Evaluation · `POST /v1/progress` Progress -> Answer ·
`PUT /v1/rounds/{n}/update` safetensors body with the `MANIFEST_HEADER`.
Any refusal is a `Refusal` with a 4xx status.
"""

import json
from enum import StrEnum
from typing import Annotated, Any, Self, TypeVar

from pydantic import Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from .accounting import NOISE_LIMIT
from .base import (
    NANOSECOND,
    Bytes,
    Count,
    Loss,
    Model,
    ModuleName,
    Name,
    Positive,
    RoundNumber,
    Score,
    Seconds,
    Sha256,
    Text,
    Word,
    explain,
    given_twice,
)
from .job import Adapter, DataSource, ModelSource, Optimizer
from .lora.format import HEAD, MatrixShape, Side, TensorShape
from .lora.methods import Start
from .precisions import Precision
from .privacy import Privacy

MANIFEST_HEADER = "FedPipe-Manifest"
"""HTTP header of an update: the UpdateManifest as compact JSON."""

CONTROL_LIMIT = 64 * 1024
"""Bytes of the largest progress, evaluation or profile body (headers have a limit of their own)."""

REGISTRATION_LIMIT = 1024 * 1024
"""Bytes of the largest registration body: it lists every matrix of the model."""

HEADER_LIMIT = 16 * 1024
"""Bytes of the largest HTTP header line."""

M = TypeVar("M", bound=Model)


class BadMessage(Exception):
    """A message that is not what it should be; one line that names the field."""


def read_message(kind: type[M], body: str | bytes) -> M:
    """Return the message in JSON text in which no name is given twice; raises BadMessage."""
    try:
        message = kind.model_validate_json(body)
    except ValidationError as error:
        raise BadMessage(explain(error)) from None
    # What is sent counts: of two fields with one name another reader could take the other.
    json.loads(body, object_pairs_hook=_once)
    return message


def _once(pairs: list[tuple[str, Any]]) -> None:
    twice = given_twice(name for name, _ in pairs)
    if twice is not None:
        raise BadMessage(f"{twice if twice.isprintable() else ascii(twice)}: given twice; send it once")


HEAD_LIMIT = 2**28
"""Parameters that all fully trained tensors may have together: 1 GiB as float32."""


class ModulesFrom(StrEnum):
    """Who chose the weights that are candidates for adaptation."""

    JOB = "job"
    PEFT = "peft"
    ALL_LINEAR = "all-linear"


class ModelShape(Model):
    """What the planner needs to know of a base model, read from its configuration without its weights."""

    architecture: Word = Field(min_length=1, description="transformers' model_type.")
    layers: int = Field(ge=1, le=10_000)
    hidden: Side
    heads: int = Field(ge=1, le=10_000)
    key_value_heads: int = Field(ge=1, le=10_000)
    intermediate: Side
    vocabulary: int = Field(ge=1, le=2**24)
    causal: bool
    gated_mlp: bool = False
    parameters: int = Field(ge=1, le=2**43, description="All base parameters, head excluded.")
    linear_parameters: int = Field(
        ge=0, le=2**43, description="Those in linear layers that quantization shrinks."
    )
    active_parameters: int | None = Field(
        default=None,
        ge=0,
        le=2**43,
        description="Those that one token is multiplied with: of experts, the ones it is sent to.",
    )
    matrices: tuple[MatrixShape, ...] = Field(min_length=1, max_length=10000, description="The candidates.")
    modules_from: ModulesFrom = ModulesFrom.JOB
    head: tuple[TensorShape, ...] = Field(default=(), max_length=100)
    head_modules: tuple[Word, ...] = Field(
        default=(),
        max_length=100,
        description="The modules that hold it, as peft's modules_to_save names them.",
    )
    precisions: tuple[Precision, ...] = Field(
        default=tuple(Precision), min_length=1, max_length=8, description="Those that differ for this model."
    )
    checkpointing: bool = Field(default=True, description="Whether it can compute activations again.")

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        """Refuse what no base model has: an inflated shape would fill the store and the memory."""
        for field, tensors in (("matrices", self.matrices), ("head", self.head)):
            if len({tensor.name for tensor in tensors}) < len(tensors):
                raise _impossible(field, "a name is given twice")
        if any(matrix.name.startswith(HEAD) for matrix in self.matrices):
            raise _impossible("matrices", f"a name begins with {HEAD!r}, as the head's tensors do")
        head = sum(tensor.size for tensor in self.head)
        if head > HEAD_LIMIT:
            raise _impossible("head", f"{head} parameters, more than {HEAD_LIMIT}")
        if self.linear_parameters > self.parameters:
            raise _impossible("linearParameters", "more than parameters")
        # A candidate can also be of the head, or the output embeddings, which may share their weights.
        largest = self.parameters + head + self.hidden * self.vocabulary
        if sum(matrix.rows * matrix.columns for matrix in self.matrices) > largest:
            raise _impossible("matrices", "together larger than the model has parameters")
        return self


def _impossible(field: str, message: str) -> PydanticCustomError:
    return PydanticCustomError("rule", "{message}", {"field": field, "message": message})


class KernelResult(Model):
    """The outcome of one real kernel at one precision."""

    precision: Precision
    usable: bool
    seconds: Seconds | None = None
    float32_seconds: Seconds | None = Field(
        default=None, description="Of the same layer in float32, timed beside it; None if not timed."
    )
    message: Text | None = None


class DeviceFacts(Model):
    """What the agent found it runs on."""

    kind: str = Field(max_length=4, pattern=r"^(cpu|cuda)$")
    name: Text = Field(max_length=128)
    uuid: Text | None = Field(default=None, max_length=128)
    compute_capability: Word | None = Field(default=None, max_length=16)
    free_memory: Bytes = Field(description="Bytes it may use in all, runtime included.")
    overhead: Bytes = Field(description="Bytes the runtime already takes of it.")
    threads: int = Field(ge=1, le=65536)
    speed: float = Field(ge=1e-6, le=1e6)
    link_rate: Positive | None = Field(default=None, description="Bytes per second.")
    kernels: tuple[KernelResult, ...] = Field(max_length=8)

    @model_validator(mode="after")
    def _has_each_precision_once(self) -> Self:
        """Refuse two results of one precision: a FedPipeNode lists each once, and could not show them."""
        if len({kernel.precision for kernel in self.kernels}) < len(self.kernels):
            raise _impossible("kernels", "a precision is given twice")
        return self


class DataNotes(Model):
    """What an agent counted in its rows, train and held out; never what they hold."""

    skipped_rows: Count = 0
    truncated_rows: Count = 0
    repeated_rows: Count = 0
    numbered_rows: Count = 0


class Registration(Model):
    """An agent presents itself; repeated after every restart of either side."""

    version: Word
    device: DeviceFacts
    model: ModelShape
    samples: Positive
    evaluation_samples: Count
    notes: DataNotes = DataNotes()


class AgentConfig(Model):
    """The part of the job an agent works by; it does not change while the agent lives."""

    job: Name
    node: Name
    model: ModelSource
    data: DataSource
    optimizer: Optimizer
    adapter: Adapter
    privacy: Privacy | None = None
    min_updates: int = Field(default=1, ge=1, le=5000)
    seed: int = Field(ge=0, le=2**31 - 1)


Rank = Annotated[int, Field(ge=0, le=4096)]


class NodePlan(Model):
    """What one node carries. `ranks` holds only the matrices it trains, by full module name."""

    precision: Precision
    micro_batch: Positive
    accumulation: Positive
    ranks: dict[ModuleName, Rank] = Field(max_length=10000)
    checkpointing: bool = False
    local_steps: Positive
    noise_multiplier: float | None = Field(
        default=None, gt=0, le=NOISE_LIMIT, description="Of private gradients, in clip norms."
    )
    predicted_bytes: Bytes = Field(description="Peak, runtime included.")
    predicted_step_seconds: Seconds
    predicted_round_seconds: Seconds
    limited_by: Word
    reason: Text = ""


class AssignmentKind(StrEnum):
    """What an agent is asked to do."""

    PROFILE = "profile"
    TRAIN = "train"
    EVALUATE = "evaluate"
    STOP = "stop"


class Blob(Model):
    """A file of the store."""

    digest: Sha256
    size: Bytes


class Assignment(Model):
    """One piece of work.

    `train` for round n: load the global adapter of round n-1 (`adapter`, None before the first update),
    evaluate it when `evaluate` is set and post that as round n-1, train, put the update as round n.
    `evaluate`: only the first half, for round `round`. `profile`: `profile_steps` measured steps and, where
    `importance` is set, matrix scores. `stop`: exit 0.
    """

    kind: AssignmentKind
    round: RoundNumber = 0
    plan: NodePlan | None = None
    adapter: Blob | None = None
    start: Start = Start.SPLIT
    learning_rate: float = Field(default=0, ge=0, le=10)
    evaluate: bool = False
    profile_steps: Count = 0
    importance: bool = False
    remaining_seconds: Seconds | None = Field(default=None, description="Until the round's deadline.")
    reason: Text = ""


class ProfileReport(Model):
    """What profiling measured on the node."""

    step_seconds: Seconds = Field(ge=NANOSECOND)
    peak_bytes: Bytes
    micro_batch: Positive = Field(description="The one that ran, after any halving.")
    scores: dict[ModuleName, Score] = Field(default_factory=dict, max_length=10000)


LOSS_LIMIT = 1000.0
"""The largest mean loss of a target (natural log) that a node reports. Chance is ln(vocabulary), about 12; a
model this far off has diverged, and how far says nothing."""


CONFUSION_CLASSES = 20
"""Of more classes no confusion matrix is sent: nobody could read it."""


class Evaluation(Model):
    """Loss and metrics of a global adapter on a node's held-out share; sums, for the engine to add."""

    round: RoundNumber
    samples: Positive
    tokens: Positive = Field(description="Predicted tokens; equals samples for classification.")
    loss_sum: float = Field(ge=0, le=1e19, description="Summed over tokens (natural log).")
    correct: Count | None = None
    confusion: tuple[Count, ...] = Field(
        default=(),
        max_length=CONFUSION_CLASSES**2,
        description="Samples by class (rows) and predicted class (columns), row by row; empty: not counted.",
    )
    precision: Precision


class UpdateManifest(Model):
    """What accompanies an update; sent in a header, so small.

    `round` and `adapter` say what the update is a change of: the round that it was made for, and the global
    adapter as it was downloaded, None where there was none. A ledger of schema 0 has neither.
    """

    round: RoundNumber = 0
    adapter: Sha256 | None = None
    digest: Sha256
    size: Bytes = Field(ge=1)
    samples: Positive
    steps: Count = Field(description="Optimizer steps done.")
    planned_steps: Positive
    micro_batch: Positive
    train_loss: Loss | None = Field(default=None, description="None where privacy withholds it.")
    step_seconds: Seconds
    peak_bytes: Bytes
    tokens: Count
    download_seconds: Seconds = 0
    evaluate_seconds: Seconds = 0
    train_seconds: Seconds = 0


STARTING = ("importing", "reading data", "checking kernels")
"""What an agent does before it registers, in this order."""


class Progress(Model):
    """A sign of life; sent at every new state, and every two seconds while working or starting."""

    kind: AssignmentKind
    round: RoundNumber
    state: Word = Field(
        max_length=32,
        description="One of STARTING, then loading, profiling, training, uploading, evaluating, failed.",
    )
    step: Count = 0
    steps: Count = 0
    loss: Loss | None = None
    memory: Bytes | None = None
    tokens_per_second: float | None = Field(default=None, ge=0, le=1e15)
    message: Text | None = None


class Answer(Model):
    """What the engine says to progress: whether the work is still wanted."""

    wanted: bool


class Refusal(Model):
    """Why a call was refused."""

    reason: Word = Field(description="A CamelCase word.")
    error: Text
