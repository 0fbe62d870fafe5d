# SPDX-License-Identifier: Apache-2.0
"""What DP-SGD spends of a privacy budget, by Rényi differential privacy of the library dp-accounting.

Operator and agent count with this module; the formulas are the library's (METHOD §6).
"""

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

NOISE_LIMIT = 64.0
"""The largest noise multiplier: beyond it a step is noise and nothing else."""
NOISE_LEAST = 0.1
"""The smallest noise multiplier that is counted. Far below it the library's floats overflow, to ε = 0."""
ORDERS = (*range(2, 33), 40, 48, 64, 128, 256)
"""Orders of the Rényi divergence. Whole ones: the series of the others need not converge."""
DIGITS = 4
"""Significant digits of a noise multiplier, rounded up."""


class Steps(NamedTuple):
    """Steps of DP-SGD on one node: of one noise multiplier (in clip norms) and one sampling rate."""

    noise_multiplier: float
    sampling_rate: float
    steps: int


def sampling_rate(batch: int, samples: int) -> float:
    """Return the chance of each sample to be in a step, for a mean of `batch` of all `samples`."""
    return min(1.0, batch / samples)


def epsilon(spent: Iterable[Steps], delta: float) -> float:
    """Return ε of all steps together, at δ; 0 for none, infinity with noise below `NOISE_LEAST`."""
    return _epsilon(tuple(spent), delta)


@lru_cache(4096)
def _epsilon(spent: tuple[Steps, ...], delta: float) -> float:
    from dp_accounting.rdp import compute_epsilon

    if not any(steps for _, _, steps in spent):
        return 0.0
    if not all(noise >= NOISE_LEAST for noise, _, _ in spent):
        return math.inf
    # Steps compose by adding their divergences.
    total = sum(steps * divergences(noise, rate) for noise, rate, steps in spent)
    return float(compute_epsilon(ORDERS, total, delta)[0])


@lru_cache(1 << 16)
def divergences(noise_multiplier: float, rate: float) -> Any:
    """Return the Rényi divergences of one step at `ORDERS`, an array; ten milliseconds the first time."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(ORDERS)
    accountant.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(noise_multiplier)))
    return accountant.rdp


def noise_multiplier(
    spent: tuple[Steps, ...], rate: float, steps: int, target: float, delta: float
) -> float | None:
    """Return the least noise multiplier with which so many more steps keep to ε `target`; None: none does."""
    low, high = NOISE_LEAST, NOISE_LIMIT

    def fits(noise: float) -> bool:
        return epsilon((*spent, Steps(noise, rate, steps)), delta) <= target

    if not fits(high):
        return None
    while high / low > 1.0005:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    unit = 10.0 ** (math.floor(math.log10(high)) - DIGITS + 1)
    return min(NOISE_LIMIT, round(math.ceil(high / unit) * unit, 10))
