"""RUN/explained.jsonl: sentences that say what an odd number of a step comes from, for the report."""

from __future__ import annotations

import json
from pathlib import Path

FILE = "explained.jsonl"


def note(run_dir: Path, step: int, sentences: list[str]) -> None:
    """Add what was found out about a step."""
    if sentences:
        with (run_dir / FILE).open("a") as file:
            file.writelines(json.dumps({"step": step, "said": said}) + "\n" for said in sentences)


def read_notes(run_dir: Path) -> list[tuple[int, str]]:
    """Steps with their sentences, each once, though a resumed run has made some steps again."""
    path = run_dir / FILE
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]  # the last may be cut off by a crash
    return sorted({(line["step"], line["said"]) for line in found})
