"""What agents and the coordinator say to each other: JSON control messages and tensor names.

Protocol (HTTP; every call is idempotent):
`GET /v1/job` Registered · `POST /v1/agents` Registration -> Registered ·
`GET /v1/assignment?wait=S` -> Assignment or 204 ·
`POST /v1/profile` ProfileReport · `GET /v1/blobs/{sha256}` (Range) ·
`POST /v1/rounds/{n}/evaluation` Evaluation · `POST /v1/progress` Progress -> Answer ·
`PUT /v1/rounds/{n}/update` safetensors body with the `MANIFEST_HEADER`.
Any refusal is a `Refusal` with a 4xx status.
"""

import math
from enum import StrEnum

from pydantic import Field, FiniteFloat

from .base import Model
from .job import Adapter, DataSource, Method, ModelSource, Name, Optimizer, Precision

MANIFEST_HEADER = "FedPipe-Manifest"
"""HTTP header of an update: the UpdateManifest as compact JSON."""

CONTROL_LIMIT = 64 * 1024
"""Bytes of the largest progress, evaluation or profile body (headers have a limit of their own)."""

REGISTRATION_LIMIT = 1024 * 1024
"""Bytes of the largest registration body: it lists every matrix of the model."""

HEADER_LIMIT = 16 * 1024
"""Bytes of the largest HTTP header line."""

LORA_A = ".lora_A"
LORA_B = ".lora_B"
HEAD = "head."
"""Tensor names. Of matrix m (a full module name): `m.lora_B` (d, r), `m.lora_A` (r, c); of a fully trained
tensor t: `head.t`. In the global adapter the matrix is the plain product lora_B @ lora_A, scale included. In
an update the increment is scale(r) * lora_B @ lora_A. All are float32; the factors of an update may be
bfloat16, those of the global adapter int8."""

SCALE = ".scale"
"""Ending of the float32 scales (r,) of a factor sent as int8: a value is int8 * its component's scale."""


def sent_as_int8(method: Method) -> bool:
    """Return whether the global adapter's factors travel to the nodes as int8, not as float32.

    Only where a node's change is counted from what it received; the methods of other papers send float32.
    """
    return method is Method.EXACT


Sha256 = str


def scale(alpha: float, rank: int, rs_lora: bool) -> float:
    """Return the LoRA scale s: alpha/r, or alpha/sqrt(r) for rsLoRA (METHOD, symbols)."""
    return alpha / math.sqrt(rank) if rs_lora else alpha / rank


class MatrixShape(Model):
    """A weight matrix (d rows = outputs, c columns = inputs)."""

    name: str = Field(max_length=256)
    rows: int = Field(ge=1)
    columns: int = Field(ge=1)


class TensorShape(Model):
    """A fully trained tensor of the task head."""

    name: str = Field(max_length=256)
    shape: tuple[int, ...] = Field(max_length=8)


class ModelShape(Model):
    """What the planner needs to know of a base model, read from its configuration without its weights."""

    architecture: str = Field(max_length=64, description="transformers' model_type.")
    layers: int = Field(ge=1)
    hidden: int = Field(ge=1)
    heads: int = Field(ge=1)
    key_value_heads: int = Field(ge=1)
    intermediate: int = Field(ge=1)
    vocabulary: int = Field(ge=1)
    causal: bool
    gated_mlp: bool = False
    parameters: int = Field(ge=1, description="All base parameters, head excluded.")
    linear_parameters: int = Field(ge=0, description="Those in linear layers that quantization shrinks.")
    matrices: tuple[MatrixShape, ...] = Field(min_length=1, max_length=10000, description="The candidates.")
    head: tuple[TensorShape, ...] = Field(default=(), max_length=100)


class KernelResult(Model):
    """The outcome of one real kernel at one precision."""

    precision: Precision
    usable: bool
    seconds: float | None = None
    message: str | None = Field(default=None, max_length=1024)


class DeviceFacts(Model):
    """What the agent found it runs on."""

    kind: str = Field(pattern=r"^(cpu|cuda)$")
    name: str = Field(max_length=128)
    uuid: str | None = Field(default=None, max_length=128)
    compute_capability: str | None = Field(default=None, max_length=16)
    free_memory: int = Field(ge=0, description="Bytes it may use in all, runtime included.")
    overhead: int = Field(ge=0, description="Bytes the runtime already takes of it.")
    threads: int = Field(ge=1)
    speed: float = Field(gt=0)
    link_rate: int | None = Field(default=None, ge=1, description="Bytes per second.")
    kernels: tuple[KernelResult, ...] = Field(max_length=8)


class Registration(Model):
    """An agent presents itself; repeated after every restart of either side."""

    version: str = Field(max_length=64)
    device: DeviceFacts
    model: ModelShape
    samples: int = Field(ge=1)
    evaluation_samples: int = Field(ge=0)


class Registered(Model):
    """The part of the job an agent works by; it does not change while the agent lives."""

    job: Name
    node: Name
    model: ModelSource
    data: DataSource
    optimizer: Optimizer
    adapter: Adapter
    seed: int


class Start(StrEnum):
    """How a node's trainable adapter starts from the global adapter (METHOD §4)."""

    SPLIT = "split"  # best rank-r part trainable, the remainder frozen (exact)
    TRUNCATE = "truncate"  # best rank-r part trainable, the remainder dropped (FlexLoRA)
    PREFIX = "prefix"  # first r rows and columns as they are (FedIT, HetLoRA)
    FRESH = "fresh"  # a fresh adapter, the whole global adapter frozen (FLoRA)


START_OF_METHOD = {
    Method.EXACT: Start.SPLIT,
    Method.TRUNCATE: Start.TRUNCATE,
    Method.AVERAGE: Start.PREFIX,
    Method.ZERO_PAD: Start.PREFIX,
    Method.STACK: Start.FRESH,
}


def uploaded_as_bf16(start: Start) -> bool:
    """Return whether nodes upload the factors they trained as bfloat16, not as float32.

    Rounding is a thousandth of a value, at random; the methods of other papers send float32.
    """
    return start is Start.SPLIT


class NodePlan(Model):
    """What one node carries. `ranks` holds only the matrices it trains, by full module name."""

    precision: Precision
    micro_batch: int = Field(ge=1)
    accumulation: int = Field(ge=1)
    ranks: dict[str, int] = Field(max_length=10000)
    checkpointing: bool = False
    local_steps: int = Field(ge=1)
    predicted_bytes: int = Field(ge=0, description="Peak, runtime included.")
    predicted_step_seconds: float = Field(ge=0)
    predicted_round_seconds: float = Field(ge=0)
    limited_by: str = Field(max_length=64)
    reason: str = Field(default="", max_length=1024)


class AssignmentKind(StrEnum):
    """What an agent is asked to do."""

    PROFILE = "profile"
    TRAIN = "train"
    EVALUATE = "evaluate"
    STOP = "stop"


class Blob(Model):
    """A file of the store."""

    digest: Sha256 = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class Assignment(Model):
    """One piece of work.

    `train` for round n: load the global adapter of round n-1 (`adapter`, None before the first update),
    evaluate it when `evaluate` is set and post that as round n-1, train, put the update as round n.
    `evaluate`: only the first half, for round `round`. `profile`: `profile_steps` measured steps and, where
    `importance` is set, matrix scores. `stop`: exit 0.
    """

    kind: AssignmentKind
    round: int = Field(default=0, ge=0)
    plan: NodePlan | None = None
    adapter: Blob | None = None
    start: Start = Start.SPLIT
    learning_rate: float = Field(default=0, ge=0)
    evaluate: bool = False
    profile_steps: int = Field(default=0, ge=0)
    importance: bool = False
    remaining_seconds: float | None = Field(default=None, description="Until the round's deadline.")
    reason: str = Field(default="", max_length=1024)


class ProfileReport(Model):
    """What profiling measured on the node."""

    step_seconds: FiniteFloat = Field(gt=0)
    peak_bytes: int = Field(ge=0)
    micro_batch: int = Field(ge=1, description="The one that ran, after any halving.")
    scores: dict[str, FiniteFloat] = Field(default_factory=dict, max_length=10000)


class Evaluation(Model):
    """Loss and metrics of a global adapter on a node's held-out share; sums, for the engine to add."""

    round: int = Field(ge=0)
    samples: int = Field(ge=1)
    tokens: int = Field(ge=1, description="Predicted tokens; equals samples for classification.")
    loss_sum: FiniteFloat = Field(ge=0, description="Summed over tokens (natural log).")
    correct: int | None = Field(default=None, ge=0)
    precision: Precision


class UpdateManifest(Model):
    """What accompanies an update; sent in a header, so small."""

    digest: Sha256 = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=1)
    samples: int = Field(ge=1)
    steps: int = Field(ge=0, description="Optimizer steps done.")
    planned_steps: int = Field(ge=1)
    micro_batch: int = Field(ge=1)
    train_loss: FiniteFloat
    step_seconds: FiniteFloat = Field(ge=0)
    peak_bytes: int = Field(ge=0)
    tokens: int = Field(ge=0)
    download_seconds: FiniteFloat = Field(default=0, ge=0)
    evaluate_seconds: FiniteFloat = Field(default=0, ge=0)
    train_seconds: FiniteFloat = Field(default=0, ge=0)


class Progress(Model):
    """A sign of life; sent at least every ten seconds while working."""

    kind: AssignmentKind
    round: int = Field(ge=0)
    state: str = Field(
        max_length=32, description="loading, evaluating, training, uploading, waiting, failed."
    )
    step: int = Field(default=0, ge=0)
    steps: int = Field(default=0, ge=0)
    loss: FiniteFloat | None = None
    memory: int | None = Field(default=None, ge=0)
    tokens_per_second: FiniteFloat | None = Field(default=None, ge=0)
    message: str | None = Field(default=None, max_length=1024)


class Answer(Model):
    """What the engine says to progress: whether the work is still wanted."""

    wanted: bool


class Refusal(Model):
    """Why a call was refused."""

    reason: str = Field(max_length=64, description="A CamelCase word.")
    error: str = Field(max_length=1024)
