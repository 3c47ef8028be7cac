"""Counts samples that are not used, names the unusable ones, and stops a run that has too many of them.

The quarantine file lists each unusable sample once, one JSON object a line:

    {"sample": "train-000003.tar/000042", "reason": "corrupt image", "detail": "png: it is empty", "read": 1017}

`read` is how many samples were read when it was found. A resumed run first drops the lines that are ahead of its
checkpoint, as it comes to those samples again.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

from gspo_mm.data.faults import BadSample, LeftOut
from gspo_mm.runtime.disk import written_whole
from gspo_mm.types import DataError

logger = logging.getLogger(__name__)

MIN_READ = 100  # samples before the bad fraction is judged: one early fault is no bad data set


class SkipLog:
    """Where a split stands in samples: read, unusable by reason, left out by reason.

    Args:
        max_bad_fraction: of samples read; more unusable ones stop the run.
        quarantine: file that lists the unusable ones; None: the log alone names them.
    """

    def __init__(self, max_bad_fraction: float, quarantine: Path | None = None) -> None:
        self._max_bad_fraction = max_bad_fraction
        self._quarantine = quarantine
        self._listed: set[str] | None = None  # samples in the file; None: it was not looked into yet
        self._unused: set[str] = set()
        self.read = 0
        self.reasons: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()

    @property
    def skipped(self) -> int:
        """Unusable samples."""
        return self.reasons.total()

    def good(self) -> None:
        self.read += 1

    def bad(self, key: str, fault: BadSample) -> None:
        """Raises DataError when more than `data.max_bad_fraction` of at least 100 samples were unusable."""
        if self._listed is None:
            self.rewind()
        self.read += 1
        if isinstance(fault, LeftOut):
            self.left_out[fault.reason] += 1
            return
        self.reasons[fault.reason] += 1
        logger.warning("skipped sample %s: %s", key, fault)
        self._list(key, fault)
        if self.read >= MIN_READ:
            self.judge()

    def unused(self, key: str, name: str) -> None:
        """Name a member or key that nothing reads, once."""
        if name not in self._unused:
            self._unused.add(name)
            logger.warning("samples hold %s, which nothing reads (first in %s)", name, key)

    def judge(self) -> None:
        """Raises DataError as `bad` does, however few were read: for the end of a data set."""
        if self.skipped > self._max_bad_fraction * self.read:
            raise DataError(
                f"{self.skipped} of {self.read} samples are unusable ({_counts(self.reasons)}), more than "
                f"data.max_bad_fraction={self._max_bad_fraction:g}; fix the shards "
                f"({self._quarantine or 'the log'} names each sample), or raise it"
            )

    def summary(self) -> str:
        """ "3 corrupt image, 1 too long", unusable and left-out samples together."""
        return _counts(self.reasons + self.left_out) or "none"

    def state(self) -> dict[str, Any]:
        return {"read": self.read, "reasons": dict(self.reasons), "left_out": dict(self.left_out)}

    def load(self, state: dict[str, Any]) -> None:
        self.read, self.reasons = state["read"], Counter(state["reasons"])
        self.left_out = Counter(state["left_out"])
        self._listed = None

    def rewind(self) -> None:
        """Drop from the file what a run that was killed found after the point where this one stands."""
        self._listed = set()
        if self._quarantine is None or not self._quarantine.exists():
            return
        kept = [line for line in self._quarantine.read_text().splitlines() if _found_by(line) <= self.read]
        with written_whole(self._quarantine) as file:
            file.write_text("".join(f"{line}\n" for line in kept))
        self._listed |= {json.loads(line)["sample"] for line in kept}

    def _list(self, key: str, fault: BadSample) -> None:
        if self._quarantine is None:
            return
        assert self._listed is not None
        if key in self._listed:  # found in an earlier epoch
            return
        self._listed.add(key)
        line = {"sample": key, "reason": fault.reason, "detail": fault.detail, "read": self.read}
        with self._quarantine.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _counts(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())


def _found_by(line: str) -> float:
    """Samples read when the line was written; infinity for a line that a kill cut off."""
    try:
        return json.loads(line)["read"]
    except ValueError:
        return float("inf")
