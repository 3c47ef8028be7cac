"""`inspect_shards.py`: its numbers are those of the shards, and its page shows what is in them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.conftest import TOOLS, run_tool
from tests.unit.test_rows import picture


def inspect(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / "inspect_shards.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "250"})


def test_counts_lengths_and_faults_are_told(tiny_model: Path, tmp_path: Path) -> None:
    rows = [
        {
            "question": f"<image>{number} <b>?",
            "images": ["0.png"] * (1 + number % 2),
            "answer": number,
            "task": "t",
        }
        for number in range(6)
    ]
    for row in rows[1::2]:
        row["question"] = "<image>" + str(row["question"])
    (tmp_path / "0.png").write_bytes(picture())
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run_tool("make_shards.py", "rows", tmp_path / "rows.jsonl", tmp_path / "out", "--samples-per-shard", 3)
    other = max((tmp_path / "out").glob("*.tar"))
    other.write_bytes(other.read_bytes()[:-1500])
    done = inspect(tmp_path / "out" / "*.tar", "--model", tiny_model, "--html", tmp_path / "sheet.html")
    assert done.returncode == 0, done.stderr
    told = re.sub(" +", " ", done.stdout)
    for line in (
        "shards 2 ",
        "tasks t 5 (100%)",
        "images per prompt 1 3 (60%), 2 2 (40%)",
        "image formats PNG RGB 7 (100%)",
        "different images 1, 1 of them more than once",
        f"skipped: damaged shard 1, first {other.name}/",
        "megapixels 0.0002 0.0002 0.0002",
        "longer side / shorter 2 2 2",
    ):
        assert line in told, told
    assert re.search(r"prompt tokens \d+ ", told)
    page = (tmp_path / "sheet.html").read_text()
    assert page.count("<article>") == 5
    assert page.count("data:image/png;base64,") == 7
    assert "[image] 0 &lt;b&gt;?" in page, "text of the data is text"


def test_a_picture_whose_body_is_damaged_has_its_place_on_the_page(tmp_path: Path) -> None:
    rows = [{"question": "<image>?", "images": [f"{name}.png"], "answer": 1} for name in ("whole", "cut")]
    (tmp_path / "whole.png").write_bytes(picture())
    (tmp_path / "cut.png").write_bytes(picture()[:45])
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run_tool("make_shards.py", "rows", tmp_path / "rows.jsonl", tmp_path / "out")
    done = inspect(tmp_path / "out" / "*.tar", "--html", tmp_path / "sheet.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "sheet.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert "training skips this sample" in page


def test_a_pattern_without_shards_is_one_sentence(tmp_path: Path) -> None:
    done = inspect(tmp_path / "*.tar")
    assert done.returncode == 1
    assert "no shard matches" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_box_that_a_reward_file_wants_is_drawn_on_the_picture(tmp_path: Path) -> None:
    rows = [{"question": "<image>where?", "images": ["0.png"], "answer": [5, 2, 15, 7], "task": "where"}]
    (tmp_path / "0.png").write_bytes(picture())  # 20 x 10 pixels
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run_tool("make_shards.py", "rows", tmp_path / "rows.jsonl", tmp_path / "out")
    arguments = (tmp_path / "out" / "*.tar", "--html", tmp_path / "sheet.html")
    done = inspect(*arguments, "--reward", TOOLS.parent / "configs/rewards/digits.yaml")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "sheet.html").read_text()
    (box,) = re.findall(r'<div class="box wanted" style="(.*?)"', page)
    assert box == "--left: 25.00%; --top: 20.00%; width: 50.00%; height: 50.00%"
    done = inspect(*arguments, "--reward", tmp_path / "gone.yaml")
    assert done.returncode == 1
    assert "gone.yaml does not exist" in done.stderr
