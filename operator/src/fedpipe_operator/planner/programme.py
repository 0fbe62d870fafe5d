# SPDX-License-Identifier: Apache-2.0
"""The integer programme of one node at one configuration: a rank for each matrix (METHOD §2)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SOLVE_NODES = 1000
"""Nodes of HiGHS's search after which the best choice found so far has to do: all jobs wait for one planner.

Not a time, so that the same request gives the same plan on any machine.
"""

HIGHS_TOLERANCE = 1e-6
"""HiGHS keeps limits and finds the optimum to this."""
ROUNDING = 1e-9
"""Distance from a whole number that means nothing."""
SPARE = 0.5
"""Of a step, between a whole limit and the last step it allows: HiGHS then mistakes neither neighbour."""

Known = dict[tuple[bytes, bytes, bytes], NDArray[np.int64]]
"""Optimal choices by programme."""


@dataclass(frozen=True)
class Programme:
    """Maximise Σ_m values[m, j_m] subject to Σ_m j_m's cost ≤ limit, for each limit.

    Attributes:
        values: (matrices, options), rising along options.
        costs: (limits, matrices, options), not negative, rising along options.
        limits: (limits,), in the unit of their costs; there may be none.
    """

    values: Floats
    costs: Floats
    limits: Floats

    def in_steps(self) -> "Programme":
        """Return the same programme, counted in the smallest cost where all costs are multiples of it.

        So they are where matrices have equal sides, as attention's often have. Then limits of memory and of
        time become one, and many nodes have equal programmes.
        """
        limits: dict[bytes, tuple[Floats, float]] = {}
        for given in zip(self.costs, self.limits, strict=True):
            costs, limit = _in_steps(*given)
            same = limits.get(costs.tobytes())
            limits[costs.tobytes()] = costs, min(limit, same[1]) if same else limit
        kept = np.array([costs for costs, _ in limits.values()]).reshape(-1, *self.values.shape)
        return Programme(self.values, kept, np.array([limit for _, limit in limits.values()]))

    def total(self, choice: NDArray[np.int64]) -> tuple[float, Floats]:
        """Return value and costs of choosing option choice[m] for each matrix m."""
        rows = np.arange(len(choice))
        return float(self.values[rows, choice].sum()), self.costs[:, rows, choice].sum(axis=1)

    def fits(self, choice: NDArray[np.int64]) -> bool:
        """Whether a choice keeps all limits."""
        return bool((self.total(choice)[1] <= self.limits).all())

    def bound(self) -> float:
        """Return an upper bound of the value: the smaller of the relaxations to a single limit."""
        alone = [self._relaxed(costs, limit)[0] for costs, limit in zip(self.costs, self.limits, strict=True)]
        return min([float(self.values.max(axis=1).sum()), *alone])

    def _relaxed(self, costs: Floats, limit: float) -> tuple[float, float]:
        """Return the optimum with fractions of options and one limit, and what a unit of the limit is worth.

        By falling value per cost.
        """
        spare = limit - costs[:, 0].sum()
        value = self.values[:, 0].sum()
        if spare < 0:
            return -np.inf, 0.0
        gains, prices = np.diff(self.values).ravel(), np.diff(costs).ravel()
        with np.errstate(all="ignore"):
            ratios = np.where(gains > 0, gains / prices, 0)
            order = np.argsort(-ratios, kind="stable")
        gains, prices, ratios = gains[order], prices[order], ratios[order]
        spent = np.cumsum(prices)
        left = spare - spent + prices
        with np.errstate(all="ignore"):
            shares = np.where(prices > 0, np.clip(left / prices, 0, 1), 1.0)
        last = np.searchsorted(spent, spare, side="right")
        return float(value + (gains * shares).sum()), float(ratios[last]) if last < len(ratios) else 0.0

    def solve(self, above: float = -np.inf, known: Known | None = None) -> NDArray[np.int64] | None:
        """Return the optimal option of each matrix, exactly; None where none fits or beats `above`.

        Args:
            above: a value; a choice worth no more is not wanted.
            known: what was solved before, to look up and to add to.
        """
        matrices, options = self.values.shape
        smallest, largest = np.zeros(matrices, np.int64), np.full(matrices, options - 1)
        if not self.fits(smallest):
            return None
        if self.fits(largest):
            return largest
        known = {} if known is None else known
        key = (self.values.tobytes(), self.costs.tobytes(), self.limits.tobytes())
        if key not in known:
            known[key] = self._optimum()
        return known[key] if self.total(known[key])[0] > above else None

    def _optimum(self) -> NDArray[np.int64]:
        """Return the best choice: what none better can have is struck out, HiGHS chooses from the rest."""
        start = self._filled()
        open_ = self._open(self.total(start)[0])
        margin = 0.0
        while (choice := self._chosen(open_, margin)) is not None and not self.fits(choice):
            margin += HIGHS_TOLERANCE
        # What nothing clearly better can have is struck out, of the start too: the rest may be worse than it.
        return start if choice is None or self.total(choice)[0] < self.total(start)[0] else choice

    def _filled(self) -> NDArray[np.int64]:
        """Return a good choice: upwards from the lowest options, by falling value per cost, while it fits."""
        gains, prices = np.diff(self.values), np.diff(self.costs)
        scarce = self.limits - self.costs[:, :, 0].sum(axis=1)
        with np.errstate(all="ignore"):
            share = np.nan_to_num(prices / scarce[:, None, None], nan=0.0, posinf=np.inf).max(axis=0)
            ratios = np.nan_to_num(gains / share, nan=np.inf, posinf=np.inf)
        choice = np.zeros(len(gains), np.int64)
        for flat in np.argsort(-ratios, axis=None, kind="stable"):
            row, step = divmod(int(flat), gains.shape[1])
            if choice[row] == step and (prices[:, row, step] <= scarce).all():
                choice[row] += 1
                scarce = scarce - prices[:, row, step]
        return choice if self.fits(choice) else np.zeros(len(gains), np.int64)

    def _open(self, reached: float) -> NDArray[np.bool_]:
        """Return which options (matrices, options) a choice worth clearly more than `reached` can have.

        Lagrangian bound: with a limit priced at any rate, an option costs at least its distance to the best
        option of its matrix.
        """
        found = np.ones(self.values.shape, bool)
        for costs, limit in zip(self.costs, self.limits, strict=True):
            price = self._relaxed(costs, limit)[1]
            priced = self.values - price * costs
            best = priced.max(axis=1, keepdims=True)
            found &= price * limit + best.sum() - (best - priced) >= reached + HIGHS_TOLERANCE
        return found

    def _chosen(self, open_: NDArray[np.bool_], margin: float) -> NDArray[np.int64] | None:
        """Return the best choice of open options, limits lowered by a share; None where there is none."""
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

        matrices, options = np.nonzero(open_)
        if len(np.unique(matrices)) < len(open_):
            return None
        costs, limits = self.costs[:, matrices, options], self.limits
        # In units of the limit, so that tolerances are relative to it; a limit of zero is none to divide by.
        unit = np.maximum(limits, 1e-6 * self.costs.max(axis=2).sum(axis=1))
        found = milp(
            -self.values[matrices, options],
            integrality=np.ones(len(matrices)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(
                    csr_array((np.ones(len(matrices)), (matrices, np.arange(len(matrices))))), 1, 1
                ),
                LinearConstraint(costs / unit[:, None], -np.inf, limits / unit - margin),
            ],
            options={"mip_rel_gap": 0.0, "node_limit": SOLVE_NODES},
        )
        if found.x is None:
            return None
        choice = np.zeros(len(open_), np.int64)
        taken = found.x > 0.5
        choice[matrices[taken]] = options[taken]
        return choice


def _in_steps(costs: Floats, limit: float) -> tuple[Floats, float]:
    """Return costs and limit as multiples of the smallest cost, or as they are where costs are none."""
    step = costs.min(initial=np.inf, where=costs > 0)
    steps = costs / step
    whole = np.rint(steps)
    if not np.isfinite(step) or (np.abs(steps - whole) > ROUNDING * whole).any():
        return costs, limit
    return whole, float(np.floor(limit / step + ROUNDING)) + SPARE
