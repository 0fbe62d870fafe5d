# SPDX-License-Identifier: Apache-2.0
"""How a round's updates become the next global adapter (METHOD §4); numpy only, made for a worker process."""

from .given import convert_given, read_given
from .messages import AggregationReport, AggregationRequest, MatrixReport, NodeReport, NodeUpdate, StoredFile
from .run import aggregate_round
from .sent import make_again
from .validation import InvalidUpdateFile, check_update_file

__all__ = [
    "AggregationReport",
    "AggregationRequest",
    "InvalidUpdateFile",
    "MatrixReport",
    "NodeReport",
    "NodeUpdate",
    "StoredFile",
    "aggregate_round",
    "check_update_file",
    "convert_given",
    "make_again",
    "read_given",
]
