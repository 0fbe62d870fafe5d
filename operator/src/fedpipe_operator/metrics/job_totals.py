# SPDX-License-Identifier: Apache-2.0
"""What the rounds of a job add up to."""

from collections import Counter
from dataclasses import dataclass, field

from ..engine.state import JobState, Round


@dataclass
class Totals:
    """Sums over rounds. An aggregated round never changes, so it is added once and not at every scrape."""

    rounds: int = 0
    """Aggregated rounds that are in."""
    updates: int = 0
    stragglers: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    planned_steps: int = 0
    done_steps: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)

    @property
    def under_training(self) -> float | None:
        """Share of planned local steps that were not done when rounds closed (METHOD §2).

        Steps that a straggler was last heard of at were done, though not counted in the aggregate.
        """
        return 1 - self.done_steps / self.planned_steps if self.planned_steps else None

    def follow(self, state: JobState) -> "Totals":
        """Add the rounds aggregated since; return these totals with the open round's part so far."""
        while self.rounds < state.done:
            self.rounds += 1
            self._add(state, state.rounds[self.rounds])
        current = state.current
        if current is None or current.result is not None:
            return self
        now = Totals(**(vars(self) | {"verdicts": self.verdicts.copy()}))
        now._add(state, current)
        return now

    def _add(self, state: JobState, known: Round) -> None:
        self.updates += len(known.updates)
        self.bytes_up += sum(manifest.size for manifest in known.updates.values())
        if known.result is not None:
            self.verdicts.update(check.verdict for check in known.result.checks.values())
        if known.closed is None:
            return
        self.bytes_down += known.closed.bytes_down
        self.stragglers += len(known.closed.stragglers)
        for manifest in known.updates.values():
            self.planned_steps += manifest.planned_steps
            self.done_steps += min(manifest.steps, manifest.planned_steps)
        plan = state.plans[known.opened.plan]
        for node, heard in known.closed.stragglers.items():
            if node in plan.nodes:
                self.planned_steps += plan.nodes[node].local_steps
                self.done_steps += min(heard, plan.nodes[node].local_steps)
