# SPDX-License-Identifier: Apache-2.0
"""The text of a scrape, written sample by sample.

prometheus_client's families take several times as long to build and print; 2,000 agents have 60,000 samples.
"""

from .definitions import NAMES

_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})


class Exposition:
    """The families of the table, in the text format 0.0.4, as they are given values."""

    def __init__(self) -> None:
        self._families: dict[str, list[str]] = {}

    def add(self, name: str, labels: tuple[str, ...], value: float | None) -> None:
        """Add a value to the family of the table with that name; None is left out."""
        if value is None:
            return
        lines = self._families.get(name)
        if lines is None:
            lines = self._families[name] = []
        if labels:
            pairs = zip(NAMES[name].labels, labels, strict=True)
            named = ",".join([f'{key}="{text.translate(_ESCAPES)}"' for key, text in pairs])
            lines.append(f"{name}{{{named}}} {float(value)!r}")
        else:
            lines.append(f"{name} {float(value)!r}")

    def extend(self, other: "Exposition") -> None:
        """Add all that was added to another."""
        for name, lines in other._families.items():
            self._families.setdefault(name, []).extend(lines)

    def text(self) -> str:
        """Return what was added."""
        return "".join(
            f"# HELP {name} {NAMES[name].help}\n# TYPE {name} {NAMES[name].kind}\n" + "\n".join(lines) + "\n"
            for name, lines in self._families.items()
        )
