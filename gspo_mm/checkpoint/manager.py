"""The run directory: everything a run needs to continue, published whole or not at all.

    RUN/config.yaml                      resolved configuration
    RUN/checkpoints/step-00000050/       policy/ (distributed.py: weights, optimizer), answers.jsonl (not yet trained on),
                                         state.json (the rest)
    RUN/owners/NUMBER.json               who trained here, and who does: owner.py
    RUN/reward-files.json                hashes of the reward files, when the last checkpoint was made
    RUN/metrics.jsonl, rollouts/, quarantine-*.jsonl, log.txt, tensorboard/, summary.json, report.html, hf/

How a checkpoint is published is said in store.py. Random state is not saved because there is
none: every draw is seeded by (run.seed, purpose, step). All ranks see one run folder (a shared file system).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch.distributed.checkpoint.api import CheckpointException

from gspo_mm.checkpoint.owner import Owner
from gspo_mm.checkpoint.store import Store, read_answers, read_state
from gspo_mm.config import CheckpointConfig, Config, load_config, save_config
from gspo_mm.config.resume import Command, changes
from gspo_mm.reward.rewards import fingerprints
from gspo_mm.runtime.disk import refusal, written_whole
from gspo_mm.runtime.dist import Ranks
from gspo_mm.types import GspoError

REWARDS = "reward-files.json"

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
        self._store = Store(path / "checkpoints", config.keep, config.keep_every, keep_best=config.keep_best)
        self._background = config.background
        self._ranks = ranks
        self._owner: Owner | None = None  # on rank 0
        self.state: dict[str, Any] | None = None  # on rank 0, of the checkpoint that the run goes on from
        self._notes: list[str] = []
        self._rewards: dict[str, str] = {}
        self._pending: tuple[int, Writing, Future[None] | None, dict[str, Any]] | None = None
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="answers")

    @classmethod
    def open(cls, config: Config, ranks: Ranks, *, command: Command = "train") -> RunDir:
        """Own the folder, create it or check that it may be continued; writes the resolved config. A collective.

        Raises ResumeError when `run.resume` forbids or misses a run, or when its settings clash, and OwnerError when
        another run works in it.
        """
        run = cls(config.run.path, config.checkpoint, ranks)
        with ranks.together():
            if ranks.main:
                try:
                    run._open(config, command)
                except GspoError:
                    run._release()
                    raise
        return run

    def _open(self, config: Config, command: Command) -> None:
        if config.run.resume == "never" and (self.path / "config.yaml").exists():
            raise ResumeError(
                f"run.resume=never but {self.path} holds a run; choose another run.name or remove it"
            )
        if config.run.resume == "must" and self.latest() is None:
            raise ResumeError(
                f"run.resume=must but {self.path} holds no checkpoint; use run.resume=auto to start one"
            )
        with _disk_may_refuse(f"run.dir={config.run.dir}", self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._owner = Owner.of(self.path)
            self._rewards = fingerprints([config.reward.file, *config.data.reward_files().values()])
            if (self.path / "config.yaml").exists():
                self._check_same_experiment(config, command)
            self._notes += [
                *filter(None, [self._owner.note]),
                *self._store.sweep(),
                *self._changed_rewards(),
            ]
            with written_whole(self.path / "config.yaml") as file:
                save_config(config, file)

    def _changed_rewards(self) -> list[str]:
        """What to say of reward files that are not as they were when the checkpoint was made."""
        known, now = self.path / REWARDS, self._rewards
        before = json.loads(known.read_text()) if self.state and known.exists() else {}
        return [
            f"{path} has changed since the run was here last: rewards from now on cannot be compared with those before"
            for path in now
            if before.get(path, now[path]) != now[path]
        ]

    def latest(self) -> Path | None:
        """The newest whole checkpoint."""
        return self._store.latest()

    def save(
        self, step: int, write_policy: WritePolicy, state: dict[str, Any], answers: Sequence[Any] = ()
    ) -> None:
        """Publish checkpoint `step`, then drop the oldest ones; one that is there already stays. A collective.

        `write_policy` is called on all ranks, `state` and `answers` of rank 0 are written as JSON. With `background` this
        returns when the write has begun, and `settle` publishes it. Raises ResumeError on every rank when the disk
        refuses; the checkpoints that were there are intact.
        """
        self.settle()
        if self._ranks.any(self._ranks.main and self._store.is_whole(self._store.path(step))):
            return
        with self._writing(step):
            if self._ranks.main:
                self._store.begin(step)
        with self._writing(step):
            writing = write_policy(self._store.temporary(step) / "policy", background=self._background)
            beside = self._beside.submit(self._store.write_answers, step, answers) if answers else None
            self._pending = (step, writing, beside, {"step": step, **state})
        if not self._background:
            self.settle()

    def settle(self, *, wait: bool = True) -> None:
        """Publish the checkpoint under way, if there is one and all ranks have written it, or else wait. A collective."""
        if self._pending is None:
            return
        step, writing, beside, state = self._pending
        if not wait and self._ranks.any(not writing.written or bool(beside and not beside.done())):
            return
        self._pending = None
        if beside:
            futures.wait([beside])  # before anything can be discarded
        with self._writing(step):
            writing.finish()
            if beside:
                beside.result()
        with self._writing(step):
            if self._ranks.main:
                self._store.publish(step, state)
                self.write_json(REWARDS, self._rewards)

    @contextmanager
    def settled(self, save: Callable[[], None] | None = None) -> Iterator[None]:
        """Leave the block, and the folder to others, with no checkpoint under way.

        A fault that all ranks share is followed by `save`, which saves what is worth it, before it goes on its way.
        """
        try:
            yield
            self.settle()
        except GspoError as fault:
            if fault.on_all_ranks or (save and self._ranks.size == 1):
                try:
                    if save:
                        save()
                    self.settle()
                except GspoError as second:
                    logger.error("the steps since the last checkpoint are lost: %s", second)
            raise
        finally:
            self._release()

    @contextmanager
    def written_together(self, what: str, *wrapped: type[BaseException]) -> Iterator[None]:
        """A block in which the run's files are written: what the disk refuses is one sentence on all ranks.

        `wrapped`: errors in which writers wrap what the disk said. Raises OwnerError too, when another run has the folder.
        """
        with self._ranks.together(), _disk_may_refuse(what, self.path, *wrapped):
            if self._owner:
                self._owner.check()
            yield

    @contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        try:
            with self.written_together(f"checkpoint {step}", RuntimeError, CheckpointException):
                yield
        except ResumeError:
            if self._ranks.main:
                self._store.discard(step)
            raise

    def _release(self) -> None:
        if self._owner:
            self._owner.release()
            self._owner = None

    def load(self, checkpoint: Path, read_policy: Callable[[Path], None]) -> dict[str, Any]:
        """Hand the policy's folder to `read_policy` on all ranks; returns `state` as given to `save`, with "step".

        On rank 0 with "answers" too, if there were any.
        """
        read_policy(checkpoint / "policy")
        answers = read_answers(checkpoint) if self._ranks.main else []
        return read_state(checkpoint) | ({"answers": answers} if answers else {})

    def write_json(self, name: str, value: Any) -> None:
        """Atomically replace RUN/name."""
        with written_whole(self.path / name, on_disk=True) as file:
            file.write_text(json.dumps(value, indent=1) + "\n")

    def log_notes(self) -> None:
        """What `open` has to say, for when the log is set up."""
        for note in self._notes:
            logger.warning(note)

    def _check_same_experiment(self, config: Config, command: Command) -> None:
        latest = self.latest()
        if latest:
            self.state = read_state(latest)
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
        self._notes = [f"resuming {self.path} with {note}" for note in found.notes]


@contextmanager
def _disk_may_refuse(what: str, folder: Path, *wrapped: type[BaseException]) -> Iterator[None]:
    try:
        yield
    except (OSError, *wrapped) as error:
        where = error.filename if isinstance(error, OSError) and error.filename else folder
        raise ResumeError(f"{what} cannot be written ({where}): {refusal(error, folder=folder)}") from None
