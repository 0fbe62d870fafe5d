"""The integer programme of one node at one configuration: a rank for each matrix (METHOD §2)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, eye_array, kron

Floats = NDArray[np.float64]


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

    def total(self, choice: NDArray[np.int64]) -> tuple[float, Floats]:
        """Return value and costs of choosing option choice[m] for each matrix m."""
        rows = np.arange(len(choice))
        return float(self.values[rows, choice].sum()), self.costs[:, rows, choice].sum(axis=1)

    def fits(self, choice: NDArray[np.int64]) -> bool:
        """Whether a choice keeps all limits."""
        return bool((self.total(choice)[1] <= self.limits).all())

    def bound(self) -> float:
        """Return an upper bound of the value: the smaller of the relaxations to a single limit."""
        alone = [self._relaxed(costs, limit) for costs, limit in zip(self.costs, self.limits, strict=True)]
        return min([float(self.values.max(axis=1).sum()), *alone])

    def _relaxed(self, costs: Floats, limit: float) -> float:
        """Return the optimum with fractions of options and one limit, by falling value per cost."""
        spare = limit - costs[:, 0].sum()
        value = self.values[:, 0].sum()
        if spare < 0:
            return -np.inf
        gains, prices = np.diff(self.values).ravel(), np.diff(costs).ravel()
        with np.errstate(all="ignore"):
            order = np.argsort(np.where(gains > 0, -gains / prices, 0), kind="stable")
        gains, prices = gains[order], prices[order]
        left = spare - np.concatenate([[0.0], np.cumsum(prices)[:-1]])
        with np.errstate(all="ignore"):
            shares = np.where(prices > 0, np.clip(left / prices, 0, 1), 1.0)
        return float(value + (gains * shares).sum())

    def solve(self) -> NDArray[np.int64] | None:
        """Return the optimal option of each matrix, exactly (HiGHS); None where nothing fits."""
        matrices, options = self.values.shape
        smallest, largest = np.zeros(matrices, np.int64), np.full(matrices, options - 1)
        if not self.fits(smallest):
            return None
        if self.fits(largest):
            return largest
        most = self.total(largest)[1]
        binding = most > self.limits
        limits = self.limits[binding]
        # In units of the limit, so that tolerances are relative to it; a limit of zero is none to divide by.
        unit = np.maximum(limits, 1e-6 * most[binding])
        scaled = self.costs[binding].reshape(-1, matrices * options) / unit[:, None]
        one_each = csr_array(kron(eye_array(matrices), np.ones((1, options))))
        allowed = limits / unit
        while True:
            found = milp(
                -self.values.ravel(),
                integrality=np.ones(matrices * options),
                bounds=Bounds(0, 1),
                constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(scaled, -np.inf, allowed)],
                options={"mip_rel_gap": 0.0},
            )
            if found.x is None:
                return smallest
            choice = found.x.reshape(matrices, options).argmax(axis=1)
            if self.fits(choice):
                return np.asarray(choice, np.int64)
            # HiGHS keeps limits to 1e-6 only.
            allowed = allowed - 1e-6
