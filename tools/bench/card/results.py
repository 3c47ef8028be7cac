"""Lines of results.jsonl: every number as soon as it is known, and one line for the end of each part.

A line says stage, part, state, whether the run was dry, card, versions, settings and numbers. States: `known` (a number of
a part that goes on), `done`, `refused` (what this card or its software does not offer), `failed`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from rich.table import Table

type Line = dict[str, Any]


class RefusedError(Exception):
    """This card, or a library for it, does not offer what a part measures; no fault of ours."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One part with all that its result depends on."""

    stage: str
    part: str
    dry: bool
    card: str
    versions: dict[str, str]
    settings: dict[str, Any]

    def is_of(self, line: Line) -> bool:
        mine = json.loads(json.dumps(asdict(self)))
        return all(line.get(key) == value for key, value in mine.items())


class Results:
    """The file in `folder`. A line is written at once and whole, so that whoever is killed leaves what it knew."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = folder / "results.jsonl"
        folder.mkdir(parents=True, exist_ok=True)

    def lines(self) -> list[Line]:
        """All but what a crash has cut off."""
        found: list[Line] = []
        for text in self._file.read_text().splitlines() if self._file.exists() else []:
            try:
                found.append(json.loads(text))
            except ValueError:
                continue
        return found

    def end_of(self, job: Job) -> Line | None:
        """The newest line of this job's end."""
        ends = [line for line in self.lines() if line.get("state") != "known" and job.is_of(line)]
        return ends[-1] if ends else None

    def add(self, job: Job, state: str, numbers: dict[str, Any], **more: Any) -> Line:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = {"time": stamp, **asdict(job), "state": state, "numbers": numbers, **more}
        torn = (
            self._file.exists() and not self._file.read_bytes().endswith(b"\n") and self._file.stat().st_size
        )
        file = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, (b"\n" if torn else b"") + json.dumps(line).encode() + b"\n")
            os.fsync(file)
        finally:
            os.close(file)
        return line


class Report:
    """What a part calls with each number that it knows: `report(tokens_per_second=...)`."""

    def __init__(self, job: Job, results: Results, out: TextIO) -> None:
        self._job, self._results, self._out = job, results, out
        self._wrong: list[str] = []
        self.numbers: dict[str, Any] = {}

    def __call__(self, **numbers: Any) -> None:
        self.numbers |= numbers
        self._results.add(self._job, "known", numbers)
        say(self._job, "  ".join(f"{name} {shown(value)}" for name, value in numbers.items()), self._out)

    def target(self, name: str, value: float | None, least: float) -> None:
        """A number with what it should reach: it is shown beside, and failing it fails nothing."""
        met = None if value is None else value >= least
        self(**{name: value, f"{name} target": {"least": least, "met": met}})

    def beside(self, part: str, **settings: Any) -> dict[str, Any]:
        """Numbers of another part with the same settings but these; none where it is not done."""
        job = replace(self._job, part=part, settings={**self._job.settings, **settings})
        end = self._results.end_of(job)
        return end["numbers"] if end and end["state"] == "done" else {}

    def check(self, is_right: bool, otherwise: str) -> None:
        """A number that shows a fault: the part goes on, and fails at its end."""
        if not is_right:
            self._wrong.append(otherwise)

    def end(self) -> None:
        """Raises AssertionError with all that was wrong."""
        assert not self._wrong, "; ".join(self._wrong)


def say(job: Job, text: str, out: TextIO) -> None:
    out.write(f"{'dry ' if job.dry else ''}{job.stage} {job.part}  {text}\n")
    out.flush()


def shown(value: Any) -> str:
    """A number for people."""
    if isinstance(value, dict) and value.keys() == {"least", "met"}:
        met = {True: "met", False: "NOT MET", None: "unknown"}[value["met"]]
        return f">= {value['least']:g}: {met}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(each)}" for key, each in value.items())
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def summary(lines: Iterable[Line], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("part", "state", "seconds", "numbers"):
        table.add_column(column, overflow="fold")
    for line in lines:
        table.add_row(*_cells(line))
    return table


def markdown(lines: Iterable[Line], title: str) -> str:
    """Rows for RESULTS.md."""
    rows = [f"{title}\n", "| part | state | seconds | numbers |", "|---|---|---|---|"]
    rows += ["| " + " | ".join(cell.replace("|", "/") for cell in _cells(line)) + " |" for line in lines]
    return "\n".join(rows)


def _cells(line: Line) -> list[str]:
    told = [f"{name} {shown(value)}" for name, value in line["numbers"].items()]
    if line["state"] in ("refused", "failed"):
        told.append(line["error"][-1] if line["error"] else "")
    name = f"{'dry ' if line['dry'] else ''}{line['stage']} {line['part']}"
    return [name, line["state"], f"{line['seconds']:.0f}", "; ".join(told)]
