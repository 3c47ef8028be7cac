"""Rows of a data set, whatever holds it: JSON lines, CSV, parquet, or Hugging Face `datasets`. One row at a time."""

from __future__ import annotations

import csv
import glob
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from gspo_mm.types import GspoError

from .rows import Row
from .writing import Refused

Form = Literal["jsonl", "json", "csv", "parquet", "hf"]

csv.field_size_limit(2**30)  # a picture as a data: URL may stand in a field


class SourceError(GspoError, ValueError):
    """A source that cannot be read, or a folder that cannot be written; one sentence."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """An opened source."""

    rows: Iterator[Row | Refused]
    folder: Path  # where relative paths of images begin
    total: int | None = None  # rows, where that is known without reading them


def open_source(name: str, form: Form | None, split: str) -> Source:
    """`name`: a file, a glob of files, a folder that `datasets` saved, or a data set's name on the hub.

    Raises SourceError when nothing is there, when it cannot be told what it is, or when its library is missing.
    """
    if form == "hf" or (form is None and Path(name).is_dir()):
        return _open_hf(name, split)
    files = sorted(Path(file) for file in glob.glob(name, recursive=True))  # noqa: PTH207  (a user's pattern)
    if not files:
        raise SourceError(
            f"{name} is no file, folder or pattern that matches any; for a data set of the hub add --format hf"
        )
    found = form or files[0].suffix.removeprefix(".").replace("ndjson", "jsonl")
    if found not in get_args(Form):
        raise SourceError(
            f"{files[0]} ends with none of .jsonl, .json, .csv, .parquet; say --format what it is"
        )
    read = _READERS[found]
    total = _parquet_rows(files) if found == "parquet" else None
    return Source(rows=(row for file in files for row in read(file)), folder=files[0].parent, total=total)


def _read_jsonl(path: Path) -> Iterator[Row | Refused]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _object(line, f"{path.name}, line {number}")


def _read_json(path: Path) -> Iterator[Row | Refused]:
    """One list of objects."""
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"{path} is no JSON: {error}; if it has an object per line, add --format jsonl"
        ) from None
    if not isinstance(rows, list):
        raise SourceError(f"{path} holds no list of rows; if it has an object per line, add --format jsonl")
    for number, row in enumerate(rows):
        yield row if isinstance(row, dict) else _refused(f"{path.name}, item {number}", "it is no object")


def _object(line: bytes, where: str) -> Row | Refused:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return _refused(where, str(error))
    return row if isinstance(row, dict) else _refused(where, "it holds no object")


def _refused(where: str, why: str) -> Refused:
    return Refused(reason="wrong json", detail=f"{where}: {why}")


def _read_csv(path: Path) -> Iterator[Row | Refused]:
    """Several images stand in one field with | between them; empty fields are null."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        names = reader.fieldnames or []
        if twice := [name for name in names if names.count(name) > 1]:
            raise SourceError(
                f"{path} has the column {twice[0]} {names.count(twice[0])} times; rename all but one"
            )
        for row in reader:
            if None in row or None in row.values():
                detail = f"{path.name}, line {reader.line_num}: {len(names)} fields are expected"
                yield Refused(reason="wrong csv", detail=detail)
                continue
            fields: dict[str, Any] = {name: value or None for name, value in row.items()}
            for name in ("image", "images"):
                if fields.get(name) and not fields[name].startswith("data:"):
                    fields[name] = fields[name].split("|")
            yield fields


def _read_parquet(path: Path) -> Iterator[Row]:
    with _parquet(path) as file:
        for batch in file.iter_batches(batch_size=64):
            yield from batch.to_pylist()


def _parquet_rows(files: list[Path]) -> int:
    total = 0
    for path in files:
        with _parquet(path) as file:
            total += file.metadata.num_rows
    return total


def _parquet(path: Path) -> Any:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise SourceError("parquet needs pyarrow: pip install pyarrow") from None
    try:
        return ParquetFile(path)
    except ArrowInvalid as error:
        raise SourceError(f"{path} is no parquet file: {error}") from None


def _open_hf(name: str, split: str) -> Source:
    """Pictures are left as bytes: decoding and encoding them again would change them."""
    try:
        import datasets
    except ImportError:
        raise SourceError("hf needs datasets: pip install datasets") from None
    try:
        if Path(name).is_dir() and _is_saved(Path(name)):
            data: Any = datasets.load_from_disk(name)
            if isinstance(data, datasets.DatasetDict):
                if split not in data:
                    raise SourceError(
                        f"{name} has no split {split}; set --split to one of {', '.join(map(str, data))}"
                    )
                data = data[split]
        else:
            data = datasets.load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"`datasets` cannot open {name}: {str(error).splitlines()[0]}") from None
    for column, feature in data.features.items():
        data = data.cast_column(column, _undecoded(feature, datasets))
    return Source(rows=iter(data), folder=Path(name) if Path(name).is_dir() else Path(), total=len(data))


def _is_saved(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("dataset_info.json", "dataset_dict.json", "state.json"))


def _undecoded(feature: Any, datasets: Any) -> Any:
    """The same feature with its images left as {bytes, path}."""
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, datasets.List):
        return datasets.List(_undecoded(feature.feature, datasets), length=feature.length)
    if isinstance(feature, dict):
        return {name: _undecoded(item, datasets) for name, item in feature.items()}
    return feature


_READERS: dict[str, Callable[[Path], Iterator[Row | Refused]]] = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "parquet": _read_parquet,
}
