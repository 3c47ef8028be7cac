"""What can be told before torch is imported: files that a config names and that are not there."""

from __future__ import annotations

import os
from pathlib import Path

from gspo_mm.config import Config, ConfigError
from gspo_mm.data.places import expand_shards
from gspo_mm.reward.sources import load_rewards
from gspo_mm.runtime.paths import from_here


def check_files(config: Config) -> None:
    """Raise a GspoError naming the first key whose file, folder or permission is missing."""
    model = Path(config.model.path)
    if not (model / "config.json").is_file():
        raise ConfigError(
            f"model.path={model} is no Hugging Face folder (no config.json in it){from_here(model)}; "
            "make a tiny one with tools/make_tiny_model.py, or download the model first"
        )
    train, validation = (
        {shard for source in config.data.sources(split) for shard in expand_shards(source.shards)}
        for split in ("train", "validation")
    )
    if overlap := train & validation:
        raise ConfigError(
            f"data.validation shares {min(overlap)} with data.train; held-out shards must be their own"
        )
    load_rewards(config.reward, config.data.reward_files())
    if config.rollout.replay and not (Path(config.rollout.replay) / "rollouts").is_dir():
        raise ConfigError(
            f"rollout.replay={config.rollout.replay} has no saved rollouts in it"
            f"{from_here(config.rollout.replay)}; name a run folder"
        )
    check_writable(config)


def check_writable(config: Config) -> None:
    """The nearest existing ancestor of the run folder must allow writing."""
    folder = config.run.path.absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"run.dir={config.run.dir}: {folder} is not writable; choose another run.dir")
