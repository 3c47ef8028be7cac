"""The checkpoints of a run, each published whole or not at all.

    step-00000050       a checkpoint: policy/, answers.jsonl if any wait, and state.json, written last, which names the step
    .tmp-step-00000100  one that is being written; renamed when it is on disk
    .old-step-00000010  one that is being removed

A checkpoint with a file KEEP in it is put aside: it is resumed from, and never removed. Only these names are ours. What
else is in the folder is never resumed from and never removed. A link of a checkpoint's name to a checkpoint is resumed
from, and left where it is. A process that dies between any two operations leaves the newest whole checkpoint in its
place, and rests that the next `sweep` removes.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orjson

from gspo_mm.runtime.disk import refusal, sync

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{8,})")
_REST = re.compile(r"\.(tmp|old)-step-\d{8,}")
_STATE, _ANSWERS = "state.json", "answers.jsonl"
_KEEP = "KEEP"


class Store:
    """RUN/checkpoints, of which `keep` stay. One process changes it at a time: the run's owner."""

    def __init__(self, folder: Path, keep: int, keep_every: int = 0, *, keep_best: bool = False) -> None:
        """`keep_every`, `keep_best`: those of every so many steps, and `best`, stay beside them."""
        self.folder = folder
        self._keep, self._keep_every, self._keep_best = keep, keep_every, keep_best

    def latest(self) -> Path | None:
        """The newest whole checkpoint."""
        return next((path for _, path in reversed(self._named()) if self.is_whole(path)), None)

    def best(self) -> Path | None:
        """The whole checkpoint of the highest held-out accuracy, the newest of equals; None where none was evaluated."""
        known = [(read_state(path).get("accuracy"), step, path) for step, path in self.whole()]
        return max((each for each in known if each[0] is not None), default=(None, 0, None))[2]

    def whole(self) -> list[tuple[int, Path]]:
        """All whole checkpoints, by step."""
        return [(step, path) for step, path in self._named() if self.is_whole(path)]

    def is_whole(self, path: Path) -> bool:
        """Whether it is a checkpoint, of the step that its name says."""
        try:
            step = read_state(path)["step"]
            written = any((path / "policy").iterdir())
        except (OSError, ValueError, LookupError, TypeError):
            return False
        return type(step) is int and written and path.name == self.path(step).name

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def begin(self, step: int) -> None:
        """Make the empty folder `temporary(step)`."""
        temporary = self.temporary(step)
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)

    def discard(self, step: int) -> None:
        """Give up a checkpoint that cannot be written: what there is of it only takes space."""
        shutil.rmtree(self.temporary(step), ignore_errors=True)

    def write_answers(self, step: int, answers: Iterable[Any]) -> None:
        """One JSON value a line, after `begin`. May run beside anything: there can be gigabytes of them."""
        with (self.temporary(step) / _ANSWERS).open("wb") as file:
            for each in answers:
                file.write(orjson.dumps(each) + b"\n")

    def publish(self, step: int, state: dict[str, Any]) -> None:
        """Make a checkpoint of what was written since `begin`, then remove those that are too many."""
        temporary, final = self.temporary(step), self.path(step)
        for written in temporary.rglob("*"):
            sync(written)
        with (temporary / _STATE).open("w") as file:
            json.dump(state, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        sync(temporary)
        if os.path.lexists(final):
            self._move_away(final)
        temporary.rename(final)
        sync(self.folder)
        best = self.best() if self._keep_best else None
        passing = [path for number, path in self.whole() if path != best and not self._stays(number, path)]
        for old in passing[: -self._keep]:
            self._remove(old)

    def _stays(self, step: int, path: Path) -> bool:
        every = self._keep_every
        return path.is_symlink() or (path / _KEEP).exists() or bool(every and step % every == 0)

    def sweep(self) -> list[str]:
        """Remove what runs that died were writing or removing; returns what there is to say of it."""
        notes = []
        for path in sorted(self.folder.iterdir()) if self.folder.is_dir() else []:
            if _REST.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                try:
                    shutil.rmtree(path)
                    notes.append(f"{path} was left unfinished by an earlier run and is removed")
                except OSError as error:
                    notes.append(
                        f"{path} was left unfinished and stays: {refusal(error, folder=self.folder)}"
                    )
        for number, path in self._named():
            if not self.is_whole(path):
                notes.append(f"{path} is no whole checkpoint of step {number}: it is left alone and not used")
        return notes

    def _named(self) -> list[tuple[int, Path]]:
        """All that has a checkpoint's name, by step."""
        try:
            names = [path.name for path in self.folder.iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        found = [match for match in map(_NAME.fullmatch, names) if match]
        return sorted((int(match[1]), self.folder / match[0]) for match in found)

    def temporary(self, step: int) -> Path:
        """Where checkpoint `step` is written."""
        return self.folder / f".tmp-step-{step:08d}"

    def _move_away(self, path: Path) -> None:
        """Keep what is no checkpoint and has the name of one, under another."""
        assert not self.is_whole(path), f"{path} is saved already"
        number = 1
        while os.path.lexists(aside := path.with_name(f"{path.name}-moved-{number}")):
            number += 1
        path.rename(aside)
        logger.warning("%s is no checkpoint and in the way of one: it is now %s", path, aside.name)

    def _remove(self, path: Path) -> None:
        """By way of a name that `latest` does not know, so that what is half removed is not taken for whole."""
        away = path.with_name(f".old-{path.name}")
        try:
            if away.exists():
                shutil.rmtree(away)
            path.rename(away)
            shutil.rmtree(away)
        except OSError as error:
            logger.warning("%s cannot be removed: %s", path, refusal(error, folder=self.folder))


def read_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / _STATE).read_text())


def read_answers(checkpoint: Path) -> list[Any]:
    """What `write_answers` wrote, if anything."""
    file = checkpoint / _ANSWERS
    if not file.exists():
        return []
    with file.open("rb") as lines:
        return [orjson.loads(line) for line in lines]
