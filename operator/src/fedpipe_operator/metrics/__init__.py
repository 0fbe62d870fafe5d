"""Prometheus metrics: jobs are read at scrape time, so their series vanish with them."""

from .collector import JobCollector, Samples
from .figures import Figures
from .table import FAMILIES, Family, markdown

__all__ = ["FAMILIES", "Family", "Figures", "JobCollector", "Samples", "markdown"]
