"""Cuts one dataset into unequal node shares, as federated data is: by chance, by label or by size."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

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
    """The labels of a file's rows, in order, and what the rows hold."""

    labels: list[Any]
    content: Any

    def write(self, rows: Sequence[int], path: Path) -> None:
        """Write the given rows."""
        if isinstance(self.content, list):
            path.write_bytes(b"".join(self.content[row] for row in (-1, *rows)))
        else:
            import pyarrow.parquet

            pyarrow.parquet.write_table(self.content.take(rows), path)


def read(path: Path, label: str) -> Dataset:
    """Read a JSONL, CSV or Parquet file; UserError names the file and line of what is wrong."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.stat().st_size > SIZE_LIMIT:
        raise UserError(f"{path}: larger than {SIZE_LIMIT >> 30} GiB; cut it beforehand")
    match path.suffix:
        case ".jsonl":
            return _read_jsonl(path, label)
        case ".csv":
            return _read_csv(path, label)
        case ".parquet":
            return _read_parquet(path, label)
    raise UserError(f"{path}: not a .jsonl, .csv or .parquet file")


def _read_jsonl(path: Path, label: str) -> Dataset:
    labels: list[Any] = []
    lines: list[bytes] = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            labels.append(json.loads(line)[label])
        except (ValueError, TypeError):
            raise UserError(f"{path}:{number}: not a JSON object") from None
        except KeyError:
            raise UserError(f"{path}:{number}: no field {label!r}; name the label with --label") from None
        lines.append(line + b"\n")
    return Dataset(labels, [*lines, b""])  # row -1 is the header: none


def _read_csv(path: Path, label: str) -> Dataset:
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            rows = list(csv.reader(file, strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not CSV: {error}") from None
    if not rows or label not in rows[0]:
        raise UserError(f"{path}: no column {label!r}; name the label with --label")
    column = rows[0].index(label)
    odd = next((n for n, row in enumerate(rows, 1) if len(row) != len(rows[0])), None)
    if odd is not None:
        raise UserError(f"{path}: row {odd} has {len(rows[odd - 1])} columns, the header has {len(rows[0])}")
    lines = []
    for row in [*rows[1:], rows[0]]:  # row -1 is the header
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(row)
        lines.append(text.getvalue().encode())
    return Dataset([row[column] for row in rows[1:]], lines)


def _read_parquet(path: Path, label: str) -> Dataset:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: Parquet needs pyarrow; pip install pyarrow") from None
    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not Parquet: {' '.join(str(error).split())}") from None
    if label not in table.column_names:
        raise UserError(f"{path}: no column {label!r}; name the label with --label")
    return Dataset(table[label].to_pylist(), table)


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
