"""Prometheus metrics: jobs are read at scrape time, so their series vanish with them."""

from .figures import Figures
from .samples import Samples
from .table import FAMILIES, Family, markdown

__all__ = ["FAMILIES", "Family", "Figures", "Samples", "markdown"]
