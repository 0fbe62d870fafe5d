# SPDX-License-Identifier: Apache-2.0
"""The aggregation methods: how a node starts, what travels at what width, what it holds (METHOD §4).

Another one is a record here, and its rule in the operator's `aggregate/methods.py`.
"""

from dataclasses import dataclass
from typing import ClassVar

from ..registry import Record
from .format import Encoding


@dataclass(frozen=True, eq=False, repr=False)
class Start(Record):
    """How a node's trainable adapter starts from the global adapter (METHOD §4).

    Attributes:
        name: on the wire.
        upload: encoding of the factors it trained.
        fresh: they start from zero change instead of the best rank-r part of the global adapter.
        holds_remainder: what is not trainable of the global adapter is held frozen; else it is dropped.
        as_is: the first r rows and columns are taken as they are, not brought to the norm of a fresh A.
    """

    name: str
    upload: Encoding = Encoding.FLOAT32
    fresh: bool = False
    holds_remainder: bool = False
    as_is: bool = False

    SPLIT: ClassVar["Start"]
    TRUNCATE: ClassVar["Start"]
    PREFIX: ClassVar["Start"]
    FRESH: ClassVar["Start"]


# Rounding is a thousandth of a value, at random; the methods of other papers send float32.
Start.SPLIT = Start("split", upload=Encoding.BFLOAT16, holds_remainder=True)
Start.TRUNCATE = Start("truncate")
Start.PREFIX = Start("prefix", as_is=True)
Start.FRESH = Start("fresh", fresh=True, holds_remainder=True)


@dataclass(frozen=True, eq=False, repr=False)
class Method(Record):
    """How unequal adapters are aggregated (METHOD §4).

    Attributes:
        name: in manifests.
        start: how a node starts, and what it uploads and holds.
        download: encoding of the global adapter's factors. A node's change must be counted from what it
            received where that is not float32.
        averages_factors: the factors themselves are averaged, so that the global adapter has the largest
            rank of a node; else it has at most maxGlobalRank.
        equal_ranks: all nodes train all matrices at one rank.
    """

    name: str
    start: Start
    download: Encoding = Encoding.FLOAT32
    averages_factors: bool = False
    equal_ranks: bool = False

    EXACT: ClassVar["Method"]
    ZERO_PAD: ClassVar["Method"]
    AVERAGE: ClassVar["Method"]
    TRUNCATE: ClassVar["Method"]
    STACK: ClassVar["Method"]


Method.EXACT = Method("exact", Start.SPLIT, download=Encoding.INT8)
Method.ZERO_PAD = Method("zero-pad", Start.PREFIX, averages_factors=True)
Method.AVERAGE = Method("average", Start.PREFIX, averages_factors=True, equal_ranks=True)
Method.TRUNCATE = Method("truncate", Start.TRUNCATE)
Method.STACK = Method("stack", Start.FRESH)
