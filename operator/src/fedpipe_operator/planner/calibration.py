# SPDX-License-Identifier: Apache-2.0
"""What measured steps say of the models on one node."""

import math
from dataclasses import dataclass

LEAST_FACTOR = 0.75
"""A measurement below the model lowers it by at most a quarter: it saw one batch of many."""


@dataclass(frozen=True)
class Calibration:
    """Corrections of every later prediction.

    An error of the fixed part is an offset, one of the activations a factor; a measurement at one point
    cannot separate them, so the correction that gives more bytes counts.

    Attributes:
        seconds_factor: measured over predicted step time.
        bytes_factor: measured over predicted bytes, runtime excluded.
        bytes_offset: measured minus predicted bytes.
    """

    seconds_factor: float = 1.0
    bytes_factor: float = 1.0
    bytes_offset: int = 0

    @classmethod
    def of(cls, step_seconds: tuple[float, float], net_bytes: tuple[int, int]) -> "Calibration":
        """Return the calibration that makes the models meet a measurement.

        Args:
            step_seconds: measured and predicted.
            net_bytes: measured and predicted peak, runtime excluded.
        """
        predicted = net_bytes[1]
        measured = max(net_bytes[0], math.ceil(LEAST_FACTOR * predicted))
        return cls(step_seconds[0] / step_seconds[1], measured / predicted, measured - predicted)

    def bytes(self, net: int) -> int:
        """Return predicted bytes, runtime excluded, corrected."""
        return max(math.ceil(net * self.bytes_factor), net + self.bytes_offset)

    def uncorrected(self, limit: int) -> int:
        """Return the largest prediction that is within `limit` when corrected."""
        return min(math.floor(limit / self.bytes_factor), limit - self.bytes_offset)
