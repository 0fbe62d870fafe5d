"""Cuts one dataset into unequal node shares, as federated data is: by chance, by label or by size."""

import csv
import gzip
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from fedpipe_api import rows as data_rows
from fedpipe_api.base import UserError

By = Literal["iid", "dirichlet", "size"]

SIZE_LIMIT = 2**31
"""Bytes of the largest file that is cut in memory."""


def split(labels: Sequence[Any], nodes: int, by: By, alpha: float, seed: int) -> list[list[int]]:
    """Return each node's sorted row indices; every row goes to exactly one node, and every node gets a row.

    `iid`: equal sizes at random. `dirichlet`: the shares of each label over the nodes are drawn from
    Dirichlet(alpha), so that a small alpha gives each node few labels (Hsu et al., arXiv 1909.06335).
    `size`: the sizes are drawn from Dirichlet(alpha), the labels are mixed.

    Raises UserError when there are fewer rows than nodes, or when alpha is not above 0.
    """
    if nodes < 1:
        raise UserError("--nodes: at least 1 is needed")
    if len(labels) < nodes:
        raise UserError(f"--nodes: {nodes} nodes cannot share {len(labels)} rows; give each at least one")
    if not 0 < alpha < 1e6:
        raise UserError(f"--alpha: {alpha:g} is not above 0")
    random = np.random.default_rng(seed)
    shares: list[list[int]] = [[] for _ in range(nodes)]
    for rows, weights in _groups(labels, nodes, by, alpha, random):
        start = 0
        for share, count in zip(shares, _counts(weights, len(rows)), strict=True):
            share.extend(rows[start : start + count])
            start += count
    for share in shares:
        if not share:
            share.append(max(shares, key=len).pop())
    return [sorted(share) for share in shares]


def _groups(
    labels: Sequence[Any], nodes: int, by: By, alpha: float, random: np.random.Generator
) -> list[tuple[list[int], np.ndarray]]:
    """Return groups of shuffled rows, each with the nodes' shares of it."""
    if by == "dirichlet":
        groups: dict[str, list[int]] = {}
        for row, label in enumerate(labels):
            groups.setdefault(str(label), []).append(row)
        ordered = [groups[label] for label in sorted(groups)]
    else:
        ordered = [list(range(len(labels)))]
    equal = np.full(nodes, 1 / nodes)
    return [
        (random.permutation(rows).tolist(), equal if by == "iid" else random.dirichlet(np.full(nodes, alpha)))
        for rows in ordered
    ]


def _counts(weights: np.ndarray, total: int) -> list[int]:
    """Return whole numbers that add up to total and are nearest to the weights (largest remainders)."""
    exact = weights * total
    counts = np.floor(exact).astype(int)
    rest = total - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:rest]] += 1
    return [int(count) for count in counts]


class Dataset(NamedTuple):
    """A file's rows in order: their labels, and what to write of each (a table for Parquet)."""

    labels: list[Any]
    content: Any
    header: bytes = b""

    def write(self, rows: Sequence[int], path: Path) -> None:
        """Write the given rows, gzipped where the path ends so."""
        if not isinstance(self.content, list):
            import pyarrow.parquet

            pyarrow.parquet.write_table(self.content.take(rows), path)
            return
        data = b"".join((self.header, *(self.content[row] for row in rows)))
        path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def read(path: Path, label: str) -> Dataset:
    """Read a JSONL, CSV (both also gzipped) or Parquet file; UserError names the place of what is wrong."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.stat().st_size > SIZE_LIMIT:
        raise UserError(f"{path}: larger than {SIZE_LIMIT >> 30} GiB; cut it beforehand")
    form = data_rows.form_of(path)
    labels: list[Any] = []
    content: list[bytes] = []
    header = b""
    for row in data_rows.read(path, form):
        if label not in row.fields:
            raise UserError(f"{row.place}: no field {label!r}; name the label with --label")
        labels.append(row.fields[label])
        if isinstance(row.source, list):
            header = header or _csv_line(list(row.fields))
            content.append(_csv_line(row.source))
        elif row.source is not None:
            content.append(row.source + b"\n")
    return Dataset(labels, _table(path) if form == "parquet" else content, header)


def suffix_of(path: Path) -> str:
    """Return the suffix that says the format, with the compression's: `.jsonl.gz`."""
    return "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix


def _csv_line(cells: list[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()


def _table(path: Path) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path)


def write_shares(dataset: Dataset, shares: Sequence[Sequence[int]], names: Sequence[str], file: Path) -> None:
    """Write each node's rows to DIRECTORY/NAME/train.SUFFIX, where `file` is DIRECTORY/train.SUFFIX.

    Raises UserError where that cannot be written.
    """
    for name, share in zip(names, shares, strict=True):
        directory = file.parent / name
        try:
            directory.mkdir(parents=True, exist_ok=True)
            dataset.write(share, directory / file.name)
        except OSError as error:
            raise UserError(f"--out: {directory}: {error.strerror}; give a directory to write into") from None
