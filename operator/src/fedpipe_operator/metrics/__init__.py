# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics: jobs are read at scrape time, so their series vanish with them."""

from .definitions import FAMILIES, Family, markdown
from .exposition import Exposition
from .operator_metrics import OperatorMetrics

__all__ = ["FAMILIES", "Exposition", "Family", "OperatorMetrics", "markdown"]
