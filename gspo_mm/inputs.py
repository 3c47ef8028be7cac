"""What can be checked before a model is loaded: files that are missing or not whole, answers that no reward part can judge."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Literal

from gspo_mm.config import Config, ConfigError
from gspo_mm.config.paths import from_here
from gspo_mm.data.faults import BadSample
from gspo_mm.data.mixture import Mixture, Source
from gspo_mm.data.places import expand_shards
from gspo_mm.data.samples import sample_key, to_prompt
from gspo_mm.hf.headers import read_headers
from gspo_mm.reward.rewards import Rewards, load_rewards
from gspo_mm.types import DataError, Prompt

_FIRST = 100  # samples of each source that are looked at before every run
_NAMED = 10  # samples in one message


def check_files(config: Config) -> None:
    """Raise a GspoError naming the first key whose file, folder or permission is missing, or that cannot be read."""
    check_model(Path(config.model.path), called="model.path=")
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


def check_model(folder: Path, *, called: str = "") -> None:
    """Raise a GspoError unless it is a Hugging Face folder with weights that can be read; `called` stands before its name."""
    if not (folder / "config.json").is_file():
        fix = "make a tiny one with tools/make_tiny_model.py, or download the model first"
        if (folder / "hf" / "config.json").is_file():
            fix = f"it is a run's folder, whose model is {folder / 'hf'}"
        raise ConfigError(
            f"{called}{folder} is no Hugging Face folder (no config.json in it){from_here(folder)}; {fix}"
        )
    read_headers(folder)


def check_writable(config: Config) -> None:
    """The nearest existing ancestor of the run folder must allow writing."""
    folder = config.run.path.absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"run.dir={config.run.dir}: {folder} is not writable; choose another run.dir")


def check_answers(
    config: Config,
    rewards: Rewards,
    *,
    everything: bool = False,
    on_prompt: Callable[[Prompt], None] = lambda prompt: None,
) -> str:
    """Have reward parts look at the answers of each source's first samples, or of all; says how many can be used.

    `on_prompt` is called with each usable one.

    Raises DataError naming samples, when more than data.max_bad_fraction of them have an answer that cannot be judged (with
    `everything`: are unusable for any reason); RewardFileError for a task that no part covers.
    """
    said = [
        _check_split(config, rewards, split, everything, on_prompt)
        for split in ("train", "validation")
        if config.data.sources(split)
    ]
    if rewards.unmeasured:
        said.append(f"tasks that count in no accuracy: {', '.join(sorted(rewards.unmeasured))}")
    return "\n".join(said)


def _check_split(
    config: Config,
    rewards: Rewards,
    split: Literal["train", "validation"],
    everything: bool,
    on_prompt: Callable[[Prompt], None],
) -> str:
    from rich.console import Console
    from rich.progress import Progress

    read = 0
    faults: list[tuple[str, BadSample]] = []
    with Progress(console=Console(stderr=True), transient=True, disable=not everything) as progress:
        bar = progress.add_task(f"data.{split}", total=None)
        for source in config.data.sources(split):
            shards = Source(name=source.name, shards=expand_shards(source.shards))
            samples = Mixture([shards], shuffle_buffer=0, seed=0, repeat=False)
            for raw, _ in islice(samples, None if everything else _FIRST):
                read += 1
                progress.update(
                    bar, advance=1, description=f"data.{split}: {read} samples, {len(faults)} unusable"
                )
                try:
                    prompt = to_prompt(raw)
                    rewards.check(prompt)
                except BadSample as fault:
                    faults.append((sample_key(raw), fault))
                else:
                    on_prompt(prompt)
    if not everything:  # others are counted where prompts are read
        faults = [(key, fault) for key, fault in faults if fault.reason == "unusable answer"]
    which = "all" if everything else "the first"
    if not faults:
        return f"data.{split}: the answers of {which} {read} samples can be judged"
    counts = ", ".join(f"{n} {reason}" for reason, n in Counter(f.reason for _, f in faults).most_common())
    named = "".join(f"\n    {key}: {fault}" for key, fault in faults[:_NAMED])
    more = f"\n    and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
    said = f"data.{split}: {len(faults)} of {which} {read} samples cannot be used ({counts}):{named}{more}"
    limit = config.data.max_bad_fraction
    if len(faults) > limit * read:
        reasons = {fault.reason for _, fault in faults}
        advice = []
        if "damaged shard" in reasons:
            advice.append("Make or copy damaged shards again.")
        if reasons - {"damaged shard"}:
            advice.append(
                f"Correct `answer` (or `meta`) in the shards' JSON, or the parts of their task in {config.reward.file}"
            )
        raise DataError(f"{said}\nThat is more than data.max_bad_fraction={limit:g}. {' '.join(advice)}")
    return f"{said}\nThey will be skipped."
