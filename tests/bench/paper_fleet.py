# SPDX-License-Identifier: Apache-2.0
"""The declared fleet of the comparison and its virtual clock.

Eight nodes of four kinds. The models trained here are small, so that the kinds' real memory and speed would bind
nothing. Memory, speeds and the deadline are therefore declared, by rules that scale with the model:

- free memory is what the float32 base takes with the kind's micro-batch and rank on every candidate matrix; on the
  A100 what full fine-tuning takes;
- speed is a share of the planner's nominal rate of the device, the rest being taken by the node's own work;
- the deadline of a round is the time in which an Orin, under the one configuration that fits every node (float32,
  micro-batch and rank of the Orin), does a quarter of the local steps.

Seconds come from the planner's models of step and transfer time with actual sizes of files; nothing is measured.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fedpipe_api import wire
from fedpipe_api.job import FedPipeJobSpec, Precision
from fedpipe_operator.planner import speed, training_memory
from fedpipe_operator.planner.workload import Configuration, Workload, workload

HEADROOM = 0.1
DEADLINE_SHARE = 0.25
FULL_TIME = 1.5
"""Full fine-tuning over training adapters: the gradient of the weights is a third product beside two."""
FULL_BYTES = training_memory.TRAINABLE_BYTES - 4
"""Of one parameter in full fine-tuning beside its value: gradient and two Adam moments."""


@dataclass(frozen=True)
class Kind:
    """A kind of node; `rank` and `micro_batch` are what its free memory carries with a float32 base."""

    name: str
    device: str
    capability: str
    speed: float
    link_rate: int
    rank: int
    micro_batch: int
    full: bool = False

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """What its hardware has; bfloat16 came with compute capability 8."""
        wanted = tuple(Precision)
        return wanted if self.capability >= "8" else tuple(p for p in wanted if p is not Precision.BF16)


ORIN = Kind("orin", "Jetson Orin 8GB", "8.7", 0.10, 2_000_000, 2, 2)
T4 = Kind("t4", "Tesla T4 16GB", "7.5", 0.15, 4_000_000, 4, 4)
RTX4090 = Kind("rtx4090", "GeForce RTX 4090 24GB", "8.9", 0.50, 12_500_000, 8, 8)
A100 = Kind("a100", "A100-SXM4-40GB", "8.0", 1.00, 125_000_000, 16, 16, full=True)
KINDS = {kind.name: kind for kind in (ORIN, T4, RTX4090, A100)}
FLEETS = {
    "heterogeneous": tuple(kind for kind in KINDS.values() for _ in range(2)),
    "homogeneous": (A100,) * 8,
}


def node_names(fleet: str) -> tuple[str, ...]:
    """Return the nodes' names, such as `orin-0`."""
    return tuple(f"{kind.name}-{index}" for index, kind in enumerate(FLEETS[fleet]))


def kind_of(node: str) -> Kind:
    """Return the kind of a node by its name."""
    return KINDS[node.rpartition("-")[0]]


def device(kind: Kind, shape: wire.ModelShape, spec: FedPipeJobSpec) -> wire.DeviceFacts:
    """Return what the planner knows of a node of the kind; `spec` is of LoRA on every candidate matrix."""
    facts = wire.DeviceFacts(
        kind="cuda",
        name=kind.device,
        compute_capability=kind.capability,
        free_memory=0,
        overhead=0,
        threads=1,
        speed=kind.speed,
        link_rate=kind.link_rate,
        kernels=tuple(wire.KernelResult(precision=precision, usable=True) for precision in kind.precisions),
    )
    work = workload(shape, spec, shape.matrices)
    configuration = Configuration(Precision.FP32, min(kind.micro_batch, work.batch))
    ranks = {matrix.name: min(kind.rank, matrix.rows, matrix.columns) for matrix in shape.matrices}
    needed = training_memory.peak_bytes(work, facts, configuration, ranks)
    if kind.full:
        needed = max(needed, full_bytes(work, facts, configuration))
    # The planner rounds budgets down by up to 0.8 %.
    return facts.model_copy(update={"free_memory": math.ceil(1.01 * needed / (1 - HEADROOM))})


def common(fleet: Iterable[Kind], batch: int) -> tuple[Configuration, int]:
    """Return the one configuration, and the one rank, that fit every node of a fleet with a float32 base."""
    kinds = list(fleet)
    micro_batch = min(batch, *(kind.micro_batch for kind in kinds))
    return Configuration(Precision.FP32, micro_batch), min(kind.rank for kind in kinds)


def deadline(shape: wire.ModelShape, spec: FedPipeJobSpec, steps: int) -> float:
    """Return the seconds of a round, the same for all systems and fleets."""
    work = workload(shape, spec, shape.matrices)
    facts = device(ORIN, shape, spec)
    configuration, rank = common((ORIN,), work.batch)
    ranks = dict.fromkeys(work.sides, rank)
    values = work.head + sum(rank * work.sides[name] for name, rank in ranks.items())
    moved = 2 * 4 * values  # down and up in float32, whatever a system sends
    step = speed.step_time(work, facts, configuration, ranks)
    # FedPipe's durations are of whole milliseconds; a deadline is at least a second.
    return max(1.0, round(speed.transfer_time(facts, moved) + DEADLINE_SHARE * steps * step, 3))


def full_bytes(work: Workload, facts: wire.DeviceFacts, configuration: Configuration) -> int:
    """Return the peak of full fine-tuning: a lower estimate, inputs of the other linear layers are left out."""
    return training_memory.fixed_bytes(work, facts, configuration) + FULL_BYTES * work.shape.parameters


def full_step(work: Workload, facts: wire.DeviceFacts, configuration: Configuration) -> float:
    """Return the seconds of one step of full fine-tuning."""
    return FULL_TIME * speed.fixed_time(work, facts, configuration)


@dataclass(frozen=True)
class Share:
    """One node's part in a round: seconds of download, of one step and of upload; steps planned and done."""

    download: float
    step: float
    upload: float
    planned: int
    done: int

    @property
    def seconds(self) -> float:
        """From the round's start to the update's arrival."""
        return self.download + self.done * self.step + self.upload


def share(download: float, step: float, upload: float, planned: int, limit: float) -> Share:
    """Return what a node does of its planned steps so that its update arrives within the limit."""
    possible = math.floor((limit - download - upload) / step + 1e-9) if math.isfinite(limit) else planned
    return Share(download, step, upload, planned, max(0, min(planned, possible)))


def round_seconds(shares: Iterable[Share], limit: float) -> float:
    """Return when a round closes: with the last update, or at the limit where a node delivers none."""
    return max(limit if not part.done else min(limit, part.seconds) for part in shares)


def under_training(shares: Mapping[str, Share], left_out: int, asked: int) -> tuple[int, int]:
    """Return steps planned and done; a node that cannot take part was asked for `asked` and does none."""
    planned = sum(part.planned for part in shares.values()) + left_out * asked
    return planned, sum(part.done for part in shares.values())
