"""Where a run stands: a live line on a terminal, plain lines in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from gspo_mm.runtime.log import CONSOLE

_SHOWN = {
    "reward/mean": "reward {:.3f}",
    "accuracy": "accuracy {:.1%}",
    "eval/accuracy": "held-out {:.1%}",
    "sft/loss": "loss {:.3f}",
    "tokens_per_second": "{:,.0f} tokens/s",
}
_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Context manager; `phase` and `step` are cheap to call. Not `shown` (ranks other than 0), it is silent."""

    def __init__(self, *, total: int, title: str, shown: bool = True) -> None:
        self._shown = shown
        self._total = total
        self._title = title
        self._done = 0
        self._began = time.monotonic()
        self._began_at = 0
        self._last_line = 0.0
        self._held_out = ""
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TextColumn("[dim]{task.fields[phase]}"),
            TimeRemainingColumn(),
        )
        self._bar = Bar(*columns, console=CONSOLE) if shown and sys.stderr.isatty() else None
        self._task = self._bar.add_task(title, total=total, numbers="", phase="") if self._bar else None

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def start_at(self, step: int) -> None:
        """A resumed run has done `step` steps already."""
        self._done = self._began_at = step
        self._began = time.monotonic()
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=step)

    def phase(self, name: str) -> None:
        if self._bar and self._task is not None:
            self._bar.update(self._task, phase=name)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Show a finished step; without a terminal at most one line every 10 s, and the last."""
        self._done = step
        if "eval/accuracy" in values:
            self._held_out = _SHOWN["eval/accuracy"].format(values["eval/accuracy"])
        shown = [
            form.format(values[name])
            for name, form in _SHOWN.items()
            if name in values and name[:5] != "eval/"
        ]
        numbers = "  ".join([*shown, self._held_out] if self._held_out else shown)
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
            return
        now = time.monotonic()
        if self._shown and (step == self._total or now - self._last_line >= _SECONDS_BETWEEN_LINES):
            self._last_line = now
            print(
                f"{self._title} {step}/{self._total}  {numbers}  {self._remaining(now)} left", file=sys.stderr
            )

    def _remaining(self, now: float) -> str:
        seconds = (now - self._began) / max(1, self._done - self._began_at) * (self._total - self._done)
        return f"{int(seconds // 60)}:{int(seconds % 60):02d}"
