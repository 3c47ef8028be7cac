"""`make_shards.py rows`: every kind of file becomes the same shards."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tests.conftest import TOOLS, run_tool
from tests.unit.test_rows import picture
from tools.shard_rows.tables import SourceError, open_source
from tools.shard_rows.writing import Refused, Splits

ROWS = 30


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    """Three questions on each of ten pictures."""
    for color in range(10):
        (tmp_path / f"{color}.png").write_bytes(picture(color))
    return [{"question": f"<image>{n}?", "images": [f"{n // 3}.png"], "answer": str(n)} for n in range(ROWS)]


def as_jsonl(rows: list[dict[str, Any]], folder: Path) -> list[str | Path]:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [folder / "rows.jsonl"]


def as_json(rows: list[dict[str, Any]], folder: Path) -> list[str | Path]:
    (folder / "rows.json").write_text(json.dumps(rows))
    return [folder / "rows.json"]


def as_csv(rows: list[dict[str, Any]], folder: Path) -> list[str | Path]:
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(row | {"images": "|".join(row["images"])} for row in rows)
    return [folder / "rows.csv"]


def inlined(rows: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    return [
        row | {"images": [{"bytes": (folder / i).read_bytes(), "path": i} for i in row["images"]]}
        for row in rows
    ]


def as_parquet(rows: list[dict[str, Any]], folder: Path) -> list[str | Path]:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(inlined(rows, folder)), folder / "rows.parquet")
    return [folder / "rows.parquet"]


def as_hf(rows: list[dict[str, Any]], folder: Path) -> list[str | Path]:
    """Its pictures are decoded when read, unless told not to."""
    data = datasets.Dataset.from_list(inlined(rows, folder))
    data = data.cast_column("images", datasets.List(datasets.Image()))
    datasets.DatasetDict(train=data).save_to_disk(folder / "saved")
    return [folder / "saved"]


def written(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@pytest.fixture
def reference(rows: list[dict[str, Any]], tmp_path: Path) -> dict[str, bytes]:
    run_tool(
        "make_shards.py", "rows", *as_jsonl(rows, tmp_path), tmp_path / "reference", "--samples-per-shard", 8
    )
    return written(tmp_path / "reference")


@pytest.mark.parametrize("save", [as_json, as_csv, as_parquet, as_hf])
def test_every_kind_of_source_gives_the_same_shards(
    save: Any, rows: list[dict[str, Any]], reference: dict[str, bytes], tmp_path: Path
) -> None:
    assert list(reference) == [f"train-{n:06d}.tar" for n in range(4)]
    run_tool(
        "make_shards.py",
        "rows",
        *save(rows, tmp_path),
        tmp_path / "out",
        "--samples-per-shard",
        8,
        "--workers",
        3,
    )
    assert written(tmp_path / "out") == reference


def test_a_picture_is_in_one_split_only(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_tool("make_shards.py", "rows", *as_jsonl(rows, tmp_path), out, "--validation", "0.4")
    of = {
        split: {data for name, data in members(out, split).items() if name.endswith("png")}
        for split in ("train", "validation")
    }
    assert of["train"]
    assert of["validation"]
    assert not of["train"] & of["validation"]
    assert sum(name.endswith("json") for split in of for name in members(out, split)) == ROWS


def test_rows_that_share_a_picture_are_in_one_split_by_whatever_way(tmp_path: Path) -> None:
    """Pictures 0-1-2-3 hang together by rows of two; a third of the rest stand in rows of two as well."""
    for color in range(60):
        (tmp_path / f"{color}.png").write_bytes(picture(color))
    pairs = [(0, 1), (1, 2), (3, 2)] + [(n, n + 1) for n in range(4, 24, 2)]
    shown = [[n] for n in range(60)] + [[*pair] for pair in pairs] + [[n, n] for n in range(5)]
    rows = [{"question": "?", "images": [f"{n}.png" for n in each], "answer": "1"} for each in shown]
    out = tmp_path / "out"
    run_tool("make_shards.py", "rows", *as_jsonl(rows, tmp_path), out, "--validation", "0.4")
    of = {
        split: {data for name, data in members(out, split).items() if name.endswith("png")}
        for split in ("train", "validation")
    }
    assert not of["train"] & of["validation"]
    assert len(of["train"] | of["validation"]) == 60
    assert 10 < len(of["validation"]) < 40
    assert sum(name.endswith("json") for split in of for name in members(out, split)) == len(rows)
    first = written(out)
    run_tool(
        "make_shards.py",
        "rows",
        tmp_path / "rows.jsonl",
        out,
        "--validation",
        "0.4",
        "--workers",
        3,
        "--force",
    )
    assert written(out) == first, "equal rows, equal bytes"


def test_a_picture_that_all_rows_share_is_trained_on(tmp_path: Path) -> None:
    for color in range(9):
        (tmp_path / f"{color}.png").write_bytes(picture(color))
    rows = [{"question": "?", "images": ["0.png", f"{n}.png"], "answer": "1"} for n in range(9)]
    (source,) = as_jsonl(rows, tmp_path)
    done = tool(source, tmp_path / "out", "--validation", "0.999")
    assert done.stdout.split()[:3] == ["train", "9", "samples"], done.stderr
    assert "9 rows are in one split, since they share pictures" in done.stdout


def test_linked_pictures_that_are_more_than_the_fraction_are_trained_on() -> None:
    def thing(place: int) -> bytes:
        return b"%032d" % place + place.to_bytes(8)

    splits = Splits(0.3)
    for n in range(9):
        splits.add([thing(n), thing(n + 1)])  # small places: each alone would be held out
    splits.add([thing(20)])
    splits.add([thing(2**64 - 1)])
    assert list(splits) == ["train"] * 9 + ["validation", "train"]


def test_columns_that_are_not_used_are_listed(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    for number, row in enumerate(rows):
        row |= {"level": number} if number % 3 else {"clip": "a.mp4"}
    (source,) = as_jsonl(rows, tmp_path)
    done = tool(source, tmp_path / "out")
    said = " ".join(done.stdout.split())
    assert f"not used: level in {ROWS * 2 // 3} rows; --meta level keeps it" in said
    refused = (
        "first row 0: unused media: column clip looks like video and is not used: video cannot be trained on"
    )
    assert f"refused: unused media {ROWS // 3}, {refused}, --ignore clip leaves it out" in said
    assert tool(source, tmp_path / "out", "--force", "--ignore", "clip", "--meta", "level").returncode == 0
    found = [
        json.loads(data) for name, data in members(tmp_path / "out", "train").items() if name.endswith("json")
    ]
    assert [record["meta"]["level"] for record in found] == [n if n % 3 else None for n in range(ROWS)]


def test_a_column_that_comes_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("question,answer,answer\na,1,2\n")
    with pytest.raises(SourceError, match="has the column answer 2 times; rename all but one"):
        list(open_source(str(tmp_path / "rows.csv"), None, "train").rows)


def members(out: Path, split: str) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for path in sorted(out.glob(f"{split}-*")):
        with tarfile.open(path) as tar:
            found |= {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    return found


def test_shards_may_be_limited_by_size_and_compressed(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_tool("make_shards.py", "rows", *as_jsonl(rows, tmp_path), out, "--shard-mb", "0.001", "--compress")
    names = [path.name for path in sorted(out.iterdir())]
    total = sum(len(data) for data in members(out, "train").values())
    assert total / 1000 / 2 < len(names) <= total / 1000, (
        "each is full once it has 1,000 bytes, and no earlier"
    )
    assert names[0] == "train-000000.tar.gz"
    assert sum(name.endswith("png") for name in members(out, "train")) == ROWS


def tool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / "make_shards.py"), "rows", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})


def test_refused_rows_are_counted_and_named(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    rows[3]["images"] = ["none.png"]
    rows[7]["answer"] = None
    (source,) = as_jsonl(rows, tmp_path)
    Path(source).write_text(Path(source).read_text() + "\n{not json\n")
    done = tool(source, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert f"train {ROWS - 2} samples".split() == done.stdout.split()[:3]
    refused = [json.loads(line) for line in (tmp_path / "out" / "refused.jsonl").read_text().splitlines()]
    assert [(r["row"], r["reason"]) for r in refused] == [
        (3, "no image"),
        (7, "no answer"),
        (ROWS, "wrong json"),
    ]
    assert f"line {ROWS + 1}" in refused[2]["detail"]


def test_nothing_usable_ends_with_1(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": 1}\n')
    done = tool(tmp_path / "rows.jsonl", tmp_path / "out")
    assert done.returncode == 1
    assert "refused: no prompt" in done.stdout


def test_shards_are_replaced_only_when_told_to_and_then_all_of_them(
    rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    (source,) = as_jsonl(rows, tmp_path)
    assert tool(source, tmp_path / "out", "--samples-per-shard", "5").returncode == 0
    done = tool(source, tmp_path / "out")
    assert done.returncode == 1
    assert "train-000000.tar exists; choose another folder or pass --force" in done.stderr
    assert tool(source, tmp_path / "out", "--force").returncode == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train-000000.tar"]


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        (
            "none.jsonl",
            None,
            "is no file, folder or pattern that matches any; for a data set of the hub add --format hf",
        ),
        ("rows.txt", "", r"rows.txt ends with none of .jsonl, .json, .csv, .parquet; say --format"),
        ("rows.json", "{", "is no JSON: .*; if it has an object per line, add --format jsonl"),
        ("rows.json", "{}", "holds no list of rows"),
        ("rows.parquet", "PAR0", "is no parquet file"),
    ],
)
def test_a_source_that_cannot_be_read_is_one_sentence(
    name: str, text: str | None, sentence: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(SourceError, match=sentence):
        list(open_source(str(tmp_path / name), None, "train").rows)


def test_a_line_of_csv_with_other_fields_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("question,answer\na,1\nb\nc,1,2\nd,\n")
    found = list(open_source(str(tmp_path / "rows.csv"), None, "train").rows)
    assert [isinstance(row, Refused) for row in found] == [False, True, True, False]
    assert found[3] == {"question": "d", "answer": None}
