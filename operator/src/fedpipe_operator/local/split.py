# SPDX-License-Identifier: Apache-2.0
"""Cuts one dataset into unequal node shares, as federated data is: by chance, by label or by size."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from fedpipe_api import rows as data_rows
from fedpipe_api.base import UserError
from fedpipe_api.rows.data_paths import created, form_of, found

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
    """Rows in order: their labels, and what to write of each (a table for Parquet and Arrow)."""

    labels: list[Any]
    content: Any
    suffix: str
    header: bytes = b""

    def write(self, rows: Sequence[int], path: Path) -> None:
        """Write the given rows, compressed as the path's suffix says."""
        if not isinstance(self.content, list):
            import pyarrow.parquet

            pyarrow.parquet.write_table(self.content.take(rows), path)
            return
        with created(path) as file:
            file.write(self.header)
            file.writelines(self.content[row] for row in rows)


def read(path: Path, label: str | None) -> Dataset:
    """Read a data set as agents read theirs: a file, a directory or a glob; UserError names what is wrong.

    Args:
        path: of the files, which have one format.
        label: the field by which rows are divided; None where they are not divided by a field.
    """
    files = found(path, "FILE")
    if sum(file.stat().st_size for file in files) > SIZE_LIMIT:
        raise UserError(f"{path}: larger than {SIZE_LIMIT >> 30} GiB; cut it beforehand")
    form = form_of(files[0])
    labels: list[Any] = []
    content: list[bytes] = []
    header: list[str] | None = None
    for row in (row for file in files for row in data_rows.read(file)):
        labels.append(None if label is None else _label(row, label))
        if isinstance(row.source, list):
            columns = list(row.fields)
            if header is not None and columns != header:
                raise UserError(
                    f"{row.place}: its file has other columns than {files[0].name}; make them equal"
                )
            header = columns
            content.append(_csv_line(row.source))
        elif form == "jsonl":
            line = json.dumps(row.fields) if row.source is None else row.source
            content.append(line.encode() + b"\n")
    if not labels:
        raise UserError(f"{path}: no rows; it needs at least one")
    if form in ("parquet", "arrow"):
        return Dataset(labels, _table(path, files), ".parquet")
    packed = files[0].suffix.lower()
    suffix = f".{form}{packed if packed in ('.gz', '.zst') else ''}"
    return Dataset(labels, content, suffix, _csv_line(header) if header else b"")


def _label(row: data_rows.Row, field: str) -> Any:
    if field not in row.fields:
        raise UserError(f"{row.place}: no field {field!r}; name the label with --label")
    value = row.fields[field]
    if isinstance(value, list | dict):
        raise UserError(f"{row.place}: field {field!r} is not one value; name the label with --label")
    return value


def _csv_line(cells: Sequence[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()


def _table(path: Path, files: Sequence[Path]) -> Any:
    """Return the rows of Parquet or Arrow files as one table, with their own types."""
    import pyarrow

    batches = [batch for file in files for batch in data_rows.batches(file)]
    try:
        return pyarrow.Table.from_batches(batches)
    except pyarrow.ArrowInvalid:
        raise UserError(f"{path}: its files have unequal columns; make them equal") from None


def write_shares(dataset: Dataset, shares: Sequence[Sequence[int]], names: Sequence[str], out: Path) -> None:
    """Write each node's rows to OUT/NAME/train.SUFFIX.

    Raises UserError where that cannot be written, or where OUT has shares: they would mix.
    """
    for path in sorted(out.glob("node-*")) if out.is_dir() else ():
        raise UserError(
            f"--out {out}: it has shares already ({path.name}); give another directory or remove them"
        )
    for name, share in zip(names, shares, strict=True):
        directory = out / name
        try:
            directory.mkdir(parents=True, exist_ok=True)
            dataset.write(share, directory / f"train{dataset.suffix}")
        except OSError as error:
            raise UserError(f"--out: {directory}: {error.strerror}; give a directory to write into") from None
