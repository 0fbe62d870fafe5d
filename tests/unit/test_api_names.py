# SPDX-License-Identifier: Apache-2.0
"""Child names: deterministic, valid, and never shared by two (job, node) pairs."""

import re

from hypothesis import given
from hypothesis import strategies as st

from fedpipe_api.names import child_name

LABELS = st.from_regex(r"\A[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?\Z")
NODES = st.lists(LABELS, min_size=1, max_size=4).map(lambda parts: ".".join(parts)[:253].rstrip("-."))
DNS_1123_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


@given(LABELS, NODES)
def test_child_name_is_a_dns_label(job: str, node: str) -> None:
    assert DNS_1123_LABEL.fullmatch(child_name(job, node))
    assert child_name(job, node) == child_name(job, node)


@given(st.sets(st.tuples(LABELS, NODES), min_size=2, max_size=20))
def test_child_names_differ(pairs: set[tuple[str, str]]) -> None:
    assert len({child_name(*pair) for pair in pairs}) == len(pairs)


@given(st.lists(LABELS, min_size=3, max_size=3))
def test_the_border_between_job_and_node_counts(parts: list[str]) -> None:
    a, b, c = parts
    assert child_name(f"{a}-{b}", c) != child_name(a, f"{b}-{c}")


@given(LABELS, LABELS)
def test_long_names_keep_their_difference(job: str, node: str) -> None:
    long = "n" * 200
    assert child_name(job, f"{long}.{node}") != child_name(job, f"{long}-{node}")


def test_child_name_starts_with_job_and_node() -> None:
    assert re.fullmatch(r"tickets-edge-1-lan-[0-9a-f]{8}", child_name("tickets", "edge-1.lan"))
