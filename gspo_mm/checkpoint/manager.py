"""The run directory: everything a run needs to continue, published whole or not at all.

    RUN/config.yaml                      resolved configuration
    RUN/checkpoints/step-00000050/       rank-00000.pt (parameters, optimizer, schedule), state.json (the rest)
    RUN/metrics.jsonl, rollouts/, log.txt, tensorboard/, summary.json, report.html, hf/

A checkpoint is written under a temporary name, synced to disk and renamed; a reader never sees a half-written
one, and a crash at any instant leaves the previous one in place. Random state is not saved because there is
none: every draw is seeded by (run.seed, purpose, step).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from gspo_mm.config import Config, load_config, save_config
from gspo_mm.types import GspoError

logger = logging.getLogger(__name__)

# what a checkpoint's content depends on: changing one of these would silently make another experiment of it
_FIXED = ("run.seed", "model.path", "data.train", "data.shuffle_buffer", "policy.dtype", "policy.freeze")


class ResumeError(GspoError, ValueError):
    """A run folder cannot be continued, or must not be."""


class RunDir:
    """One run's folder. Open with `RunDir.open`, which decides between a new run and a resumed one."""

    def __init__(self, path: Path, *, keep: int, rank: int = 0) -> None:
        self.path = path
        self._keep = keep
        self._rank = rank

    @classmethod
    def open(cls, config: Config, *, rank: int = 0) -> RunDir:
        """Create the folder or check that it may be continued; writes the resolved config.

        Raises ResumeError when `run.resume` forbids or misses a run, or when its settings clash.
        """
        run = cls(config.run.path, keep=config.checkpoint.keep, rank=rank)
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
            run._check_same_experiment(config)
        if rank == 0:
            run._create(config)
        return run

    def latest(self) -> Path | None:
        """The newest whole checkpoint."""
        found = sorted((self.path / "checkpoints").glob("step-*/state.json"))
        return found[-1].parent if found else None

    def save(self, step: int, model_state: dict[str, Any], state: dict[str, Any]) -> Path:
        """Publish checkpoint `step`: `model_state` by torch.save, `state` as JSON; then drop the oldest ones.

        Raises ResumeError when the disk refuses; the checkpoints that were there are intact.
        """
        try:
            return self._save(step, model_state, state)
        except (OSError, RuntimeError) as error:  # torch's writer wraps what the disk said in a RuntimeError
            raise ResumeError(
                f"checkpoint {step} cannot be written to {self.path} ({' '.join(str(error).split())[:200]}); free "
                "some space there, or choose another run.dir, and start again with run.resume=auto"
            ) from None

    def _save(self, step: int, model_state: dict[str, Any], state: dict[str, Any]) -> Path:
        final = self.path / "checkpoints" / f"step-{step:08d}"
        temporary = final.with_name(f".tmp-{final.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        with (temporary / f"rank-{self._rank:05d}.pt").open("wb") as file:
            torch.save(model_state, file)
            _sync(file)
        with (temporary / "state.json").open("w") as file:  # last: its presence marks the folder as whole
            json.dump({"step": step, **state}, file, indent=1)
            _sync(file)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _sync_folder(final.parent)
        for old in sorted(final.parent.glob("step-*"))[: -self._keep]:
            shutil.rmtree(old)
        return final

    def load(self, checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """(model_state, state) as given to `save`, `state["step"]` included. Nothing is unpickled."""
        file = checkpoint / f"rank-{self._rank:05d}.pt"
        if not file.exists():
            raise ResumeError(
                f"{checkpoint} has no {file.name}: it was written by fewer ranks; resume with the same parallel layout"
            )
        return torch.load(file, weights_only=True, map_location="cpu"), json.loads(
            (checkpoint / "state.json").read_text()
        )

    def write_json(self, name: str, value: Any) -> None:
        """Atomically replace RUN/name."""
        temporary = self.path / f".tmp-{name}"
        with temporary.open("w") as file:
            json.dump(value, file, indent=1)
            file.write("\n")
            _sync(file)
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

    def _check_same_experiment(self, config: Config) -> None:
        before = load_config(self.path / "config.yaml")
        for key in _FIXED:
            old, new = _lookup(before, key), _lookup(config, key)
            if old != new:
                raise ResumeError(
                    f"{self.path} was started with {key}={old!r} but the config now says {new!r}; "
                    "restore it, or choose another run.name"
                )
        changed = sorted(_differences(before.model_dump(), config.model_dump()))
        if changed:
            logger.warning("resuming %s with changed settings: %s", self.path, ", ".join(changed))


def _lookup(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [d for k in new for d in _differences(old.get(k), new[k], f"{prefix}.{k}" if prefix else k)]
    return [] if old == new else [f"{prefix}={new!r} (was {old!r})"]


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
