"""The run directory: everything a run needs to continue, published whole or not at all.

    RUN/config.yaml                      resolved configuration
    RUN/checkpoints/step-00000050/       policy/ (distributed.py: weights, optimizer), state.json (the rest)
    RUN/metrics.jsonl, rollouts/, quarantine-*.jsonl, log.txt, tensorboard/, summary.json, report.html, hf/

A checkpoint is written under a temporary name, synced to disk and renamed; a reader never sees a half-written
one, and a crash at any instant leaves the previous one in place. Random state is not saved because there is
none: every draw is seeded by (run.seed, purpose, step). All ranks see one run folder (a shared file system).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch.distributed.checkpoint.api import CheckpointException

from gspo_mm.config import CheckpointConfig, Config, load_config, save_config
from gspo_mm.config.resume import Command, changes
from gspo_mm.runtime.dist import Ranks
from gspo_mm.types import GspoError

logger = logging.getLogger(__name__)


class ResumeError(GspoError, ValueError):
    """A run folder cannot be continued, or must not be."""


class Writing(Protocol):
    """A part of a checkpoint that is being written: `distributed.Saving`."""

    @property
    def written(self) -> bool: ...
    def finish(self) -> None: ...


class WritePolicy(Protocol):
    """Begins to write the policy into a folder that it creates: `distributed.save_policy`."""

    def __call__(self, folder: Path, *, background: bool) -> Writing: ...


class RunDir:
    """One run's folder. Open with `RunDir.open`, which decides between a new run and a resumed one."""

    def __init__(self, path: Path, config: CheckpointConfig, ranks: Ranks) -> None:
        self.path = path
        self._keep = config.keep
        self._background = config.background
        self._ranks = ranks
        self.state: dict[str, Any] | None = None  # on rank 0, of the checkpoint that the run goes on from
        self._notes: list[str] = []
        self._pending: tuple[int, Writing, dict[str, Any]] | None = None

    @classmethod
    def open(cls, config: Config, ranks: Ranks, *, command: Command = "train") -> RunDir:
        """Create the folder or check that it may be continued; writes the resolved config. A collective.

        Raises ResumeError when `run.resume` forbids or misses a run, or when its settings clash.
        """
        run = cls(config.run.path, config.checkpoint, ranks)
        with ranks.together():
            if ranks.main:
                run._open(config, command)
        return run

    def _open(self, config: Config, command: Command) -> None:
        run = self
        exists = (run.path / "config.yaml").exists()
        if exists and config.run.resume == "never":
            raise ResumeError(
                f"run.resume=never but {run.path} holds a run; choose another run.name or remove it"
            )
        if run.latest() is None and config.run.resume == "must":
            raise ResumeError(
                f"run.resume=must but {run.path} holds no checkpoint; use run.resume=auto to start one"
            )
        if exists:
            run._check_same_experiment(config, command)
        run._create(config)

    def latest(self) -> Path | None:
        """The newest whole checkpoint."""
        found = sorted((self.path / "checkpoints").glob("step-*/state.json"))
        return found[-1].parent if found else None

    def save(self, step: int, write_policy: WritePolicy, state: dict[str, Any]) -> None:
        """Publish checkpoint `step`, then drop the oldest ones. A collective.

        `write_policy` is called on all ranks, `state` of rank 0 is written as JSON. With `checkpoint.background` this
        returns when the write has begun, and `settle` publishes it. Raises ResumeError on every rank when the disk
        refuses; the checkpoints that were there are intact.
        """
        self.settle()
        temporary = self._checkpoint(step, temporary=True)
        with self._ranks.together(), self._disk_may_refuse(step):
            if self._ranks.main:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        with self._ranks.together(), self._disk_may_refuse(step):
            writing = write_policy(temporary / "policy", background=self._background)
            self._pending = (step, writing, {"step": step, **state})
        if not self._background:
            self.settle()

    def settle(self, *, wait: bool = True) -> None:
        """Publish the checkpoint under way, if there is one and all ranks have written it, or else wait. A collective."""
        if self._pending is None:
            return
        step, writing, state = self._pending
        if not wait and self._ranks.any(not writing.written):
            return
        self._pending = None
        with self._ranks.together(), self._disk_may_refuse(step):
            writing.finish()
        with self._ranks.together(), self._disk_may_refuse(step):
            if self._ranks.main:
                self._publish(
                    self._checkpoint(step, temporary=True), self._checkpoint(step, temporary=False), state
                )

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Leave the block with no checkpoint under way, also when a fault that all ranks share ends it."""
        try:
            yield
        except GspoError as fault:
            if fault.on_all_ranks:
                self.settle()
            raise
        self.settle()

    def _checkpoint(self, step: int, *, temporary: bool) -> Path:
        return self.path / "checkpoints" / f"{'.tmp-' if temporary else ''}step-{step:08d}"

    def _publish(self, temporary: Path, final: Path, state: dict[str, Any]) -> None:
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync_path(file)
        with (temporary / "state.json").open("w") as file:  # last: its presence marks the folder as whole
            json.dump(state, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _sync_path(final.parent)
        for old in sorted(final.parent.glob("step-*"))[: -self._keep]:
            shutil.rmtree(old)

    @contextmanager
    def _disk_may_refuse(self, step: int) -> Iterator[None]:
        try:
            yield
        # the writers wrap what the disk said in errors of their own
        except (OSError, RuntimeError, CheckpointException) as error:
            raise ResumeError(
                f"checkpoint {step} cannot be written to {self.path} ({_reason(error)}); free "
                "some space there, or choose another run.dir, and start again with run.resume=auto"
            ) from None

    def load(self, checkpoint: Path, read_policy: Callable[[Path], None]) -> dict[str, Any]:
        """Hand the policy's folder to `read_policy` on all ranks; returns `state` as given to `save`, with "step"."""
        read_policy(checkpoint / "policy")
        return _read_state(checkpoint)

    def write_json(self, name: str, value: Any) -> None:
        """Atomically replace RUN/name."""
        temporary = self.path / f".tmp-{name}"
        with temporary.open("w") as file:
            json.dump(value, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path / name)

    def _create(self, config: Config) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            temporary = self.path / ".tmp-config.yaml"
            save_config(config, temporary)
            temporary.replace(self.path / "config.yaml")
        except OSError as error:
            raise ResumeError(
                f"run.dir={config.run.dir} cannot be written ({error.strerror}); choose a writable run.dir"
            ) from None

    def log_notes(self) -> None:
        """What `open` has to say, for when the log is set up."""
        for note in self._notes:
            logger.warning("resuming %s with %s", self.path, note)

    def _check_same_experiment(self, config: Config, command: Command) -> None:
        latest = self.latest()
        if latest:
            self.state = _read_state(latest)
        state = self.state or {}
        if (written_by := state.get("command", command)) != command:
            raise ResumeError(
                f"{self.path} holds a run of `gspo-mm {written_by}`, which `gspo-mm {command}` cannot continue; choose "
                "another run.name"
            )
        before = load_config(self.path / "config.yaml", any_world=True)
        under_way = len((state.get("scheduler") or {}).get("pending", ()))
        found = changes(before, config, command=command, under_way=under_way)
        if found.refusals:
            raise ResumeError(
                f"{self.path} was started with {found.refusals[0]}; restore it, or choose another run.name"
            )
        self._notes = found.notes


def _read_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "state.json").read_text())


def _reason(error: BaseException) -> str:
    """What the disk said, out of the traceback that torch's checkpoint code makes of it."""
    while isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split())[-200:]


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
