# SPDX-License-Identifier: Apache-2.0
"""What aggregation is asked and what it answers; everything here is frozen and can be pickled."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedpipe_api.job import Aggregation

Verdict = Literal["ok", "clipped", "flagged", "rejected"]


@dataclass(frozen=True)
class NodeUpdate:
    """One accepted update: its file, the samples behind it, and the rank of each matrix the node trained."""

    node: str
    path: Path
    samples: int
    ranks: Mapping[str, int]


@dataclass(frozen=True)
class AggregationRequest:
    """One round's aggregation.

    `alpha` and `rs_lora` give the LoRA scale. `adapter` is the global adapter the updates started from and
    `server_state` the server optimizer's state beside it; None before the first. `norms` are the norms of
    earlier updates that the running median still sees, in any order. New files are made in `directory`.
    `as_is` says that nodes downloaded `adapter` itself, although the method rounds what is sent.
    `threads` matrices are worked on at a time (default: one a core, at most 4); the bytes of the result do
    not depend on it.
    """

    aggregation: Aggregation
    alpha: float
    rs_lora: bool
    updates: tuple[NodeUpdate, ...]
    directory: Path
    adapter: Path | None = None
    server_state: Path | None = None
    norms: tuple[float, ...] = ()
    as_is: bool = False
    threads: int | None = None


@dataclass(frozen=True)
class StoredFile:
    """A new file, already on disk (fsync done) under a temporary name."""

    path: Path
    digest: str
    size: int


@dataclass(frozen=True)
class MatrixReport:
    """What became of one matrix.

    `relative_error` is ‖stored − T‖_F / ‖T‖_F with T = G + Σ w D exactly, after the server optimizer's step
    where there is one and the method works in factor space. Rounding to float32 counts; figures under 1e-7
    are noise. Where terms were folded, and for `zero-pad` and `average`, it is an estimate from 8 random
    probes: within about 20 % a matrix, less in the total. `discarded_energy` is the share of σ² cut off by
    maxGlobalRank. `effective_rank` is exp of the entropy of σ²/Σσ² of the stored matrix. `spectrum` holds
    its largest singular values, at most 16.
    """

    rank: int
    relative_error: float
    discarded_energy: float
    effective_rank: float
    spectrum: tuple[float, ...]


@dataclass(frozen=True)
class NodeReport:
    """What became of one node's update.

    `norm` is the Frobenius norm of its change over all its tensors (0 where that is not finite), `cosine`
    the median of those to each of the other accepted nodes, over the tensors that both trained; None without
    others or change. `verdict` is the most severe finding, `reason` one line that names every finding.
    """

    norm: float
    cosine: float | None
    verdict: Verdict
    reason: str


@dataclass(frozen=True)
class AggregationReport:
    """The outcome of one round.

    `sent` is what nodes download in place of `adapter`; None where they download that.

    `relative_error` is over all matrices together (root of the summed squares), `discarded_energy` the
    share of the summed σ², `effective_rank` the mean over matrices; over the matrices that some node
    trained.
    """

    adapter: StoredFile
    sent: StoredFile | None
    server_state: StoredFile | None
    matrices: Mapping[str, MatrixReport]
    nodes: Mapping[str, NodeReport]
    relative_error: float
    discarded_energy: float
    effective_rank: float
