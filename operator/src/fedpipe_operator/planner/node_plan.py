# SPDX-License-Identifier: Apache-2.0
"""The best plan of one node (METHOD §2, §3): what it is worth, what it may use, and what limits it."""

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedpipe_api import units, wire
from fedpipe_api.job import FedPipeJobSpec
from fedpipe_api.precisions import Precision, allowed

from . import format, speed, training_memory
from .programme import Floats, Known, Programme
from .workload import Configuration, Workload

SPEED_VALUE = 0.05
"""Worth of the node's fastest configuration; another is worth so much less as it is slower."""
SLOW_PENALTY = 1.2
"""Of a precision that is slower than float32 on the node's CPU, and again for each doubling of the time: more
than ranks, precision and speed are worth together, so that it is taken only where no faster one fits."""
UNTRAINED_PENALTY = 2.0
"""Of a selected matrix left out: more than all else is worth, so that none is where all can be trained."""
STEPS_FOR_RANKS = 0.9
"""A node that cannot do all its local steps does this share of those it could do at the lowest ranks, which
pays for higher ones: ranks cost little time."""
SAME = 1e-5
"""Difference of worth that means nothing; HiGHS stops within 1e-6 of the optimum."""


@dataclass(frozen=True)
class Case:
    """What distinguishes one node from another: nodes of equal cases get equal plans.

    Attributes:
        device: facts, without name and uuid where they do not matter.
        budget: bytes it may use, runtime included.
        room: bytes that the memory model may predict for it, runtime excluded.
        seconds: of a round it may use.
        steps: optimizer steps it is asked for.
        evaluation_samples: evaluated before training.
        seconds_factor: measured over predicted step time.
    """

    device: wire.DeviceFacts
    budget: int
    room: int
    seconds: float
    steps: int
    evaluation_samples: int
    seconds_factor: float


@dataclass(frozen=True)
class Choice:
    """A node's plan, before it is put in the node's own figures."""

    configuration: Configuration
    ranks: dict[str, int]
    steps: int
    value: float
    limited_by: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Infeasible:
    """Why no plan fits."""

    reason: str


@dataclass(frozen=True)
class _Option:
    """A configuration with its bytes and seconds, linear in the ranks: fixed + Σ per_rank · r."""

    configuration: Configuration
    slowness: float
    value: float
    fixed_bytes: int
    bytes_per_rank: Floats
    step_seconds: float
    step_seconds_per_rank: Floats
    other_seconds: float
    other_seconds_per_rank: Floats

    def bytes(self, ranks: NDArray[np.int64]) -> float:
        return float(self.fixed_bytes + (self.bytes_per_rank * ranks).sum())

    def steps_within(self, seconds: float, ranks: NDArray[np.int64]) -> int:
        """Return the local steps that fit into a round."""
        step = self.step_seconds + float((self.step_seconds_per_rank * ranks).sum())
        other = self.other_seconds + float((self.other_seconds_per_rank * ranks).sum())
        # A step that fits exactly counts in spite of rounding.
        return max(0, math.floor((seconds - other) / step + 1e-9)) if seconds < math.inf else sys.maxsize

    def fits(self, ranks: NDArray[np.int64], room: float, seconds: float, steps: int) -> bool:
        """Whether a choice of ranks keeps both limits."""
        return self.bytes(ranks) <= room and self.steps_within(seconds, ranks) >= steps

    def programme(
        self, ranks: NDArray[np.int64], values: Floats, room: float, seconds: float, steps: int
    ) -> Programme:
        """Return the programme of choosing among the ranks (matrices, options)."""
        per_rank = steps * self.step_seconds_per_rank + self.other_seconds_per_rank
        costs, limits = [], []
        if room < math.inf:
            costs.append(self.bytes_per_rank[:, None] * ranks)
            limits.append(room - self.fixed_bytes)
        if seconds < math.inf:
            costs.append(per_rank[:, None] * ranks)
            limits.append(seconds * (1 + 1e-9) - steps * self.step_seconds - self.other_seconds)
        shape = (len(costs), *ranks.shape)
        return Programme(values, np.array(costs).reshape(shape), np.array(limits)).in_steps()


class Problem:
    """One case of one job."""

    def __init__(
        self,
        work: Workload,
        spec: FedPipeJobSpec,
        weights: Mapping[str, float],
        ranks: tuple[int, ...],
        case: Case,
        *,
        known: Known,
    ):
        """Prepare the configurations.

        Args:
            work: the job's workload.
            spec: the job.
            weights: importance of the selected matrices, summing to 1.
            ranks: to choose from, rising.
            case: the node.
            known: programmes solved for other nodes.
        """
        self.case = case
        self._known = known
        self._spec = spec
        self._work = work
        self._names = [matrix.name for matrix in work.selected]
        self._weights = np.array([weights[name] for name in self._names])
        self._top = math.log2(1 + ranks[-1])
        sides = np.array([[min(matrix.rows, matrix.columns)] for matrix in work.selected])
        self._ranks: NDArray[np.int64] = np.minimum(np.array([ranks]), sides)
        self._options = list(self._configurations()) if self._precisions else []

    @property
    def _precisions(self) -> tuple[Precision, ...]:
        works = {kernel.precision for kernel in self.case.device.kernels if kernel.usable}
        works &= set(self._work.shape.precisions)
        return tuple(precision for precision in allowed(self._spec.quantization) if precision in works)

    def _configurations(self) -> Iterator[_Option]:
        """Yield every configuration of the node."""
        work, device = self._work, self.case.device
        batch = self._spec.rounds.batch_size
        choices = [
            Configuration(precision, size, checkpointing)
            for precision in self._precisions
            for size in range(1, batch + 1)
            if batch % size == 0
            for checkpointing in ((False, True) if work.shape.checkpointing else (False,))
        ]
        factor = self.case.seconds_factor
        seconds = {choice: factor * speed.fixed_time(work, device, choice) for choice in choices}
        fastest = min(seconds.values())
        sides = np.array([work.sides[name] for name in self._names])
        per_rank = factor * sides * speed.rank_time(work, device, 1)
        transfers = speed.transfer_time(device, speed.download_bytes(work) + speed.upload_bytes(work, {}))
        for choice in choices:
            one, two = (training_memory.rank_bytes(work, choice, side) for side in (1, 2))
            evaluation = factor * speed.evaluation_time(work, device, choice, self.case.evaluation_samples)
            slowness = speed.slowness(device, choice.precision)
            slow = SLOW_PENALTY * (1 + math.log2(slowness)) if slowness > 1 else 0.0
            yield _Option(
                configuration=choice,
                slowness=slowness,
                value=choice.precision.worth + SPEED_VALUE * fastest / seconds[choice] - slow,
                fixed_bytes=training_memory.fixed_bytes(work, device, choice),
                bytes_per_rank=(2 * one - two + (two - one) * sides).astype(np.float64),
                step_seconds=seconds[choice],
                step_seconds_per_rank=per_rank,
                other_seconds=transfers + evaluation,
                other_seconds_per_rank=sides * speed.transfer_time(device, work.upload.width),
            )

    def solve(self) -> Choice | Infeasible:
        """Return the best choice and what limits it, or why there is none."""
        if not self._options:
            return Infeasible(
                format.no_precision(self.case.device, self._work.shape, allowed(self._spec.quantization))
            )
        partial = not any(option.bytes(self._ranks[:, 0]) <= self.case.room for option in self._options)
        smallest = self._smallest() if partial else self._ranks[:, 0]
        roomy = [option for option in self._options if option.bytes(smallest) <= self.case.room]
        if not roomy:
            return Infeasible(self._no_room(smallest))
        possible = max(option.steps_within(self.case.seconds, self._ranks[:, 0]) for option in roomy)
        if not possible:
            return Infeasible(self._no_time(roomy))
        steps = self.case.steps
        if possible < steps:
            steps = max(1, math.floor(STEPS_FOR_RANKS * possible))
        found = self._best(steps, self.case.room, self.case.seconds, partial)
        assert found is not None
        explained = self._explained(found, possible)
        slowness = self._option(found.configuration).slowness
        if slowness == 1:
            return explained
        slow = format.slow(found.configuration.precision, slowness)
        return _because(explained, explained.limited_by, f"{explained.reason}; {slow}")

    def value(self, configuration: Configuration, ranks: Mapping[str, int]) -> float:
        """Return what a plan is worth: weighted utility of ranks, u(r) = log₂(1 + r), precision and speed."""
        option = self._option(configuration)
        chosen = np.array([ranks.get(name, 0) for name in self._names])
        return option.value + float(self._utilities(chosen[:, None]).sum())

    def feasible(self, configuration: Configuration, ranks: Mapping[str, int], steps: int) -> bool:
        """Whether a plan made earlier still keeps all limits and bounds."""
        option = next((option for option in self._options if option.configuration == configuration), None)
        if option is None or not ranks.keys() <= set(self._names):
            return False
        chosen = np.array([ranks.get(name, 0) for name in self._names])
        known = bool(((chosen[:, None] == self._ranks).any(axis=1) | (chosen == 0)).all())
        return known and option.fits(chosen, self.case.room, self.case.seconds, steps)

    def highest_common_rank(self) -> int | None:
        """Return the index of the largest rank that all matrices can have at the steps planned."""
        chosen = self.solve()
        if isinstance(chosen, Infeasible):
            return None
        slowest = self._option(chosen.configuration).slowness
        options = [option for option in self._options if option.slowness <= slowest]
        for index in reversed(range(self._ranks.shape[1])):
            ranks = self._ranks[:, index]
            if any(option.fits(ranks, self.case.room, self.case.seconds, chosen.steps) for option in options):
                return index
        return None

    def _option(self, configuration: Configuration) -> _Option:
        return next(option for option in self._options if option.configuration == configuration)

    def _utilities(self, ranks: NDArray[np.int64]) -> Floats:
        """Return the worth of each rank (matrices, options); an untrained matrix costs the penalty."""
        worth = self._weights[:, None] * np.log2(1 + ranks) / self._top
        return np.where(ranks > 0, worth, -UNTRAINED_PENALTY)

    def _best(
        self, steps: int, room: float, seconds: float, partial: bool, above: float = -math.inf
    ) -> Choice | None:
        """Return the best choice within the limits that is worth more than `above`.

        `partial` lets matrices go untrained.
        """
        ranks = self._ranks
        if partial:
            ranks = np.concatenate([np.zeros((len(ranks), 1), np.int64), ranks], axis=1)
        values = self._utilities(ranks)
        candidates = []
        for option in self._options:
            if option.fits(ranks[:, 0], room, seconds, steps):
                programme = option.programme(ranks, values, room, seconds, steps)
                candidates.append((option.value + programme.bound(), option, programme))
        best: Choice | None = None
        for bound, option, programme in sorted(candidates, key=lambda candidate: -candidate[0]):
            least = best.value if best else above
            if bound <= least:
                break
            found = programme.solve(least - option.value, self._known)
            if found is None or not (chosen := ranks[np.arange(len(found)), found]).any():
                continue
            value = option.value + programme.total(found)[0]
            if value > least:
                named = {name: int(rank) for name, rank in zip(self._names, chosen, strict=True) if rank}
                best = Choice(option.configuration, named, steps, value)
        return best

    def _explained(self, found: Choice, possible: int) -> Choice:
        """Add what limits a choice, found by lifting one limit after the other."""
        case = self.case
        if possible < case.steps:
            return _because(
                found,
                "time",
                format.fewer_steps(case.steps, found.steps, self._spec.rounds.deadline),
            )
        for limited_by, room, seconds in (
            ("memory", math.inf, case.seconds),
            ("time", self.case.room, math.inf),
            ("memory", math.inf, math.inf),
        ):
            freed = self._best(found.steps, room, seconds, partial=False, above=found.value + SAME)
            if freed is not None:
                return _because(found, limited_by, self._better(freed, limited_by, len(found.ranks)))
        return _because(
            found, "ranks", "the highest ranks that spec.adapter.ranks allows fit at this precision"
        )

    def _better(self, freed: Choice, limited_by: str, trained: int) -> str:
        """Say what a node without the limit would carry, and what that takes."""
        option = self._option(freed.configuration)
        ranks = np.array([freed.ranks.get(name, 0) for name in self._names])
        if limited_by == "memory":
            takes = units.memory(self._peak(option, ranks)) + f"; it may use {units.memory(self.case.budget)}"
        else:
            one = option.step_seconds + (option.step_seconds_per_rank * ranks).sum()
            other = option.other_seconds + (option.other_seconds_per_rank * ranks).sum()
            takes = units.duration(freed.steps * one + other)
            takes += f"; it may take {units.duration(self.case.seconds)}"
        text = f"{format.configuration(freed.configuration, self._work.batch)}, {format.ranks(freed.ranks)}"
        text += f" would take {takes}"
        untrained = len(self._names) - trained
        return text + (f"; {untrained} selected matrices are not trained here" if untrained else "")

    def _peak(self, option: _Option, ranks: NDArray[np.int64]) -> int:
        """Return the bytes of a choice: within the budget where the prediction is within the room."""
        return math.ceil(option.bytes(ranks)) + self.case.budget - self.case.room

    def _smallest(self) -> NDArray[np.int64]:
        """Return the smallest ranks of all: one matrix, the cheapest, at the lowest rank."""
        cost = self._options[0].bytes_per_rank * self._ranks[:, 0]
        return np.where(np.arange(len(cost)) == cost.argmin(), self._ranks[:, 0], 0)

    def _no_room(self, smallest: NDArray[np.int64]) -> str:
        least = min(self._options, key=lambda option: option.bytes(smallest))
        return format.no_room(
            self._peak(least, smallest), least.configuration, int(smallest.max()), self.case.budget
        )

    def _no_time(self, roomy: list[_Option]) -> str:
        lowest = self._ranks[:, 0]

        def step(option: _Option) -> float:
            return option.step_seconds + float((option.step_seconds_per_rank * lowest).sum())

        least = min(roomy, key=step)
        other = least.other_seconds + float((least.other_seconds_per_rank * lowest).sum())
        return format.no_time(
            step(least),
            other,
            least.configuration,
            int(lowest.max()),
            limit=self.case.seconds,
            deadline=self._spec.rounds.deadline,
        )


def _because(choice: Choice, limited_by: str, reason: str) -> Choice:
    return Choice(choice.configuration, choice.ranks, choice.steps, choice.value, limited_by, reason)
