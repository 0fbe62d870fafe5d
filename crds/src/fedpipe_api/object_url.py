# SPDX-License-Identifier: Apache-2.0
"""URLs of object stores, such as `s3://bucket/prefix`, and what it means that one is inside another."""

import re
from dataclasses import dataclass
from typing import Self

_BUCKET = r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]"
_SEGMENT = r"[A-Za-z0-9_~=+-][A-Za-z0-9._~=+-]*"
_AZURE = r"az://[a-z0-9]{3,24}/[a-z0-9-]{3,63}"
OBJECT_URL_PATTERN = rf"^((s3|gs)://{_BUCKET}|{_AZURE})(/{_SEGMENT})*/?$"
"""No user or password, no port, no query, no escapes, no `..`, no second URL inside the first."""

EXAMPLES = "s3://BUCKET/PATH, gs://BUCKET/PATH or az://ACCOUNT/CONTAINER/PATH"


@dataclass(frozen=True)
class ObjectURL:
    """A place in an object store. `parts` are bucket and path; without any it is a whole scheme."""

    scheme: str
    parts: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the place that a URL names; ValueError for any other text."""
        if not re.fullmatch(OBJECT_URL_PATTERN[1:-1], text):
            raise ValueError(f"must be a URL of an object store: {EXAMPLES}, with plain path segments")
        scheme, _, rest = text.partition("://")
        return cls(scheme, tuple(rest.rstrip("/").split("/")))

    @classmethod
    def parse_prefix(cls, text: str) -> Self:
        """Return the place that a URL or a bare scheme such as `s3://` names; ValueError for other texts."""
        if text in ("s3://", "gs://", "az://"):
            return cls(text.removesuffix("://"), ())
        return cls.parse(text)

    def inside(self, prefix: "ObjectURL") -> bool:
        """Return whether this is the prefix itself or below it, by whole segments."""
        return self.scheme == prefix.scheme and self.parts[: len(prefix.parts)] == prefix.parts

    def __truediv__(self, name: str) -> "ObjectURL":
        """Return the place below this one."""
        return ObjectURL(self.scheme, (*self.parts, name))

    def __str__(self) -> str:
        """Return the URL."""
        return f"{self.scheme}://{'/'.join(self.parts)}"
