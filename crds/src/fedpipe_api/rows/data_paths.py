# SPDX-License-Identifier: Apache-2.0
"""Which files are a node's data: a file, a directory or a glob of shards; their formats and compression."""

import gzip
import io
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from ..base import UserError
from ..job import DataSource

_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
_COMPRESSED = (".gz", ".zst")
_NO_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""What the library datasets writes beside its shards."""
FILE_LIMIT = 10_000
"""Files of one data set."""


def locate(directory: Path, source: DataSource) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Return the train and evaluation files of a node, each sorted by name.

    Raises:
        UserError: a file is missing, empty or of unknown format, or is both train and evaluation data.
    """
    train = found(directory / source.train, "spec.data.train", source.format)
    if not source.evaluation:
        return train, ()
    evaluation = found(directory / source.evaluation, "spec.data.evaluation", source.format)
    both = set(train) & set(evaluation)
    if both:
        raise UserError(
            f"{min(both)}: both spec.data.train and spec.data.evaluation name it; keep them apart"
        )
    return train, evaluation


def found(path: Path, field: str, form: str | None = None) -> tuple[Path, ...]:
    """Return the files that a path names: itself, the data files of a directory, or those a glob matches.

    Files without bytes are left out where others have some, as a writer of shards may leave them.
    """
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = _at_most(path, (each for each in path.iterdir() if _is_shard(each, form)))
    elif any(sign in str(path) for sign in "*?["):
        base = Path(*path.parts[: next(i for i, part in enumerate(path.parts) if set(part) & set("*?["))])
        pattern = str(path.relative_to(base))
        files = _at_most(path, (each for each in base.glob(pattern) if _visible(each)))
    else:
        raise UserError(f"{path}: no such file; put the node's data there or correct {field}")
    if not files:
        raise UserError(f"{path}: no data files; put the node's data there or correct {field}")
    some = [each for each in files if each.stat().st_size]
    if not some:
        raise UserError(f"{files[0]}: the file is empty; {field} needs at least one row")
    forms = sorted({form_of(each, form) for each in some})
    if len(forms) > 1:
        raise UserError(
            f"{path}: files of several formats ({', '.join(forms)}); name those of one in {field}"
        )
    return tuple(sorted(some))


def _at_most(path: Path, files: Any) -> list[Path]:
    some = list(islice(files, FILE_LIMIT + 1))
    if len(some) > FILE_LIMIT:
        raise UserError(f"{path}: more than {FILE_LIMIT} files; join them to fewer")
    return some


def _is_shard(path: Path, form: str | None) -> bool:
    known = _by_suffix(path) is not None or _given(form) is not None
    return _visible(path) and known and path.name not in _NO_ROWS


def _visible(path: Path) -> bool:
    return path.is_file() and not path.name.startswith((".", "_"))


def _by_suffix(path: Path) -> str | None:
    plain = path.with_suffix("") if path.suffix.lower() in _COMPRESSED else path
    return _SUFFIXES.get(plain.suffix.lower())


def _given(form: str | None) -> str | None:
    """Return the file format in `spec.data.format`, which may name a layout of rows instead."""
    return form if form in _SUFFIXES.values() else None


def form_of(path: Path, form: str | None = None) -> str:
    """Return the format, `jsonl`, `csv`, `parquet` or `arrow`: the given one, else by the suffix.

    Raises:
        UserError: the suffix is unknown.
    """
    known = _given(form) or _by_suffix(path)
    if known is None:
        names = "name it .jsonl, .csv, .parquet or .arrow"
        raise UserError(f"{path}: unknown suffix; {names}, or set spec.data.format")
    return known


def opened(path: Path) -> io.BufferedReader:
    """Open a file for reading, decompressed by its suffix."""
    match path.suffix.lower():
        case ".gz":
            return cast(io.BufferedReader, gzip.open(path))
        case ".zst":
            return io.BufferedReader(_arrow(path).input_stream(str(path), compression="zstd"))
    return path.open("rb")


def created(path: Path) -> IO[bytes]:
    """Open a file for writing, compressed by its suffix; the same bytes give the same file."""
    match path.suffix.lower():
        case ".gz":
            return cast(IO[bytes], gzip.GzipFile(path, "wb", mtime=0))
        case ".zst":
            return cast(IO[bytes], _arrow(path).output_stream(str(path), compression="zstd"))
    return path.open("wb")


def _arrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"{path}: needs pyarrow; pip install pyarrow") from None
    return pyarrow
