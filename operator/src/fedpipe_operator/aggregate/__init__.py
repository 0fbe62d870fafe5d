"""How a round's updates become the next global adapter (METHOD §4); numpy only, made for a worker process."""

from .checks import Refused, check_update_file
from .messages import AggregationReport, AggregationRequest, MatrixReport, NodeReport, NodeUpdate, StoredFile
from .run import aggregate_round

__all__ = [
    "AggregationReport",
    "AggregationRequest",
    "MatrixReport",
    "NodeReport",
    "NodeUpdate",
    "Refused",
    "StoredFile",
    "aggregate_round",
    "check_update_file",
]
