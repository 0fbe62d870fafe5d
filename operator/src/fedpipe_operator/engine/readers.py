# SPDX-License-Identifier: Apache-2.0
"""Who is being sent a file of the store: a removed file takes its place on the disk until nobody reads it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Readers:
    """Readers by the digest of their file; when it is removed they are cut off, however slowly they read."""

    def __init__(self) -> None:
        self._cuts: dict[str, list[Callable[[], None]]] = {}

    @contextmanager
    def reading(self, digest: str, cut: Callable[[], None]) -> Iterator[None]:
        """Count a reader for the time of the block; `cut` ends its connection."""
        self._cuts.setdefault(digest, []).append(cut)
        try:
            yield
        finally:
            cuts = self._cuts[digest]
            cuts.remove(cut)
            if not cuts:
                del self._cuts[digest]

    def cut_off(self, digest: str) -> None:
        """End the connections of all who read the file."""
        for cut in list(self._cuts.get(digest, ())):
            cut()
