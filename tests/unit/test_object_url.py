# SPDX-License-Identifier: Apache-2.0
"""URLs of object stores: what is one, and what is inside what, against a reference on lists of segments."""

import re

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from fedpipe_api.base import UserError
from fedpipe_api.object_url import OBJECT_URL_PATTERN, ObjectURL
from fedpipe_operator.kube.settings import AllowedStore, OperatorSettings

BUCKETS = st.sampled_from(["adapters", "adapters-other", "adapters.other", "a-b"])
SEGMENTS = st.lists(st.sampled_from(["a", "ab", "a.b", "a=1", "_", "a-"]), max_size=4)
PLACES = st.tuples(st.sampled_from(["s3", "gs"]), BUCKETS, SEGMENTS)


def url_of(place: tuple[str, str, list[str]], end: str = "") -> str:
    scheme, bucket, segments = place
    return f"{scheme}://{'/'.join((bucket, *segments))}{end}"


@given(PLACES, PLACES, st.sampled_from(["", "/"]), st.sampled_from(["", "/"]))
@example(("s3", "adapters", ["ab"]), ("s3", "adapters", ["a"]), "", "")
@example(("s3", "adapters-other", []), ("s3", "adapters", []), "", "")
def test_inside_goes_by_whole_segments(
    one: tuple[str, str, list[str]], other: tuple[str, str, list[str]], end: str, other_end: str
) -> None:
    url, prefix = ObjectURL.parse(url_of(one, end)), ObjectURL.parse_prefix(url_of(other, other_end))
    path, start = [one[1], *one[2]], [other[1], *other[2]]
    assert url.inside(prefix) == (one[0] == other[0] and path[: len(start)] == start)
    assert url.inside(ObjectURL.parse_prefix(f"{one[0]}://"))
    assert (url / "job").inside(url)
    assert ObjectURL.parse(str(url)) == url


@given(st.text(max_size=40) | st.from_regex(r"\A(s3|gs|az|file|http)://[a-zA-Z0-9./:@%?#~\\ -]{0,24}\Z"))
@example("s3://bucket/a\n")
@example("s3://bucket/..")
@example("reference::http://host/a")
@example("s3://a:b@bucket/a")
def test_what_is_parsed_has_plain_segments_only(text: str) -> None:
    assume(re.fullmatch(OBJECT_URL_PATTERN[1:-1], text) is None)
    with pytest.raises(ValueError, match="must be a URL of an object store"):
        ObjectURL.parse(text)


@given(st.from_regex(OBJECT_URL_PATTERN.replace("$", r"\Z"), alphabet=st.characters(codec="ascii")))
def test_no_url_leaves_its_bucket_or_names_a_host_or_a_person(text: str) -> None:
    url = ObjectURL.parse(text)
    assert url.scheme in ("s3", "gs", "az")
    assert all(part and not part.startswith(".") and not set(part) & set("@:%?#\\/") for part in url.parts)
    assert text.rstrip("/") == str(url)


@pytest.mark.parametrize(
    ("allowed", "url", "endpoint"),
    [
        (["s3://adapters/team-a"], "s3://adapters/team-a", None),
        (["s3://adapters/team-a"], "s3://adapters/team-a/x/", None),
        (["s3://"], "s3://any", None),
        (["s3://,https://minio:9000", "s3://adapters"], "s3://adapters/x", None),
        (["s3://adapters,https://minio:9000", "s3://"], "s3://adapters/x", "https://minio:9000"),
        (["az://account/models"], "az://account/models/x", None),
    ],
)
def test_the_longest_prefix_allows(allowed: list[str], url: str, endpoint: str | None) -> None:
    stores = tuple(map(AllowedStore.parse, allowed))
    assert settings_with(stores).store_of(url).endpoint == endpoint


@pytest.mark.parametrize(
    ("allowed", "url"),
    [
        ([], "s3://adapters"),
        (["s3://adapters/team-a"], "s3://adapters"),
        (["s3://adapters/team-a"], "s3://adapters/team-ab"),
        (["s3://adapters"], "s3://adapters-other"),
        (["s3://adapters"], "gs://adapters"),
        (["az://account/models"], "az://account/models2"),
    ],
)
def test_everything_else_is_refused_with_what_the_administrator_sets(allowed: list[str], url: str) -> None:
    stores = tuple(map(AllowedStore.parse, allowed))
    with pytest.raises(UserError, match=r"spec.output.url: .*administrator.*output.allowed") as caught:
        settings_with(stores).store_of(url)
    assert not any(prefix in str(caught.value) for prefix in allowed), "the prefixes of others are not said"


@pytest.mark.parametrize(
    "text", ["file:///", "http://host", "s3://a,ftp://host", "gs://bucket,https://host", ""]
)
def test_a_prefix_that_is_none_ends_the_start(text: str) -> None:
    with pytest.raises(UserError, match="--output-allow"):
        AllowedStore.parse(text)


def settings_with(stores: tuple[AllowedStore, ...]) -> OperatorSettings:
    from pathlib import Path

    return OperatorSettings(
        "fedpipe", "fedpipe", Path("/store"), "agent:1", "operator:1", output_allowed=stores
    )
