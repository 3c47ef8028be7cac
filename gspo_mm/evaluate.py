"""Greedy answers to held-out prompts, judged by the reward file."""

from __future__ import annotations

import logging
from collections import defaultdict
from contextlib import closing
from statistics import fmean

from gspo_mm.config import Config
from gspo_mm.reward.sources import Rewards, describe_failures, load_rewards
from gspo_mm.rollout.engine import RolloutEngine, sample_groups
from gspo_mm.types import EncodedPrompt, RolloutGroup, SamplingParams

logger = logging.getLogger(__name__)


def evaluate(
    engine: RolloutEngine, prompts: list[EncodedPrompt], reward: Rewards, *, max_new_tokens: int
) -> tuple[dict[str, float], list[RolloutGroup]]:
    """Metrics {"eval/accuracy", "eval/reward", "eval/accuracy/<task>"} and the scored answers, one per prompt.

    A completion whose reward failed counts as wrong: a benchmark number must not rise because a judge broke.
    """
    sampling = SamplingParams(temperature=0.0, max_new_tokens=max_new_tokens)
    groups = sample_groups(engine, prompts, group_size=1, sampling=sampling, seed=0, first_id=0)
    groups = reward.score_groups(groups)
    if failures := describe_failures(groups, what="held-out answers"):
        logger.warning(failures)
    right: dict[str, list[float]] = defaultdict(list)
    for group in groups:
        right[group.prompt.task].append(group.scores[0].accuracy or 0.0)
    everything = [x for values in right.values() for x in values]
    metrics = {
        "eval/accuracy": fmean(everything),
        "eval/reward": fmean(0.0 if g.scores[0].error else g.scores[0].value for g in groups),
        **{f"eval/accuracy/{task}": fmean(values) for task, values in sorted(right.items())},
    }
    return metrics, groups


def evaluate_folder(config: Config) -> dict[str, float]:
    """Evaluate the model in `config.model.path` on `config.data.validation`, without a policy."""
    from gspo_mm.data.processor import Processor
    from gspo_mm.rollout.registry import forget_ended, servers_folder
    from gspo_mm.stages import build_engine, held_out_prompts, set_threads
    from gspo_mm.sync.push import serve_folder

    set_threads(config)
    if config.rollout.engine == "sglang":
        forget_ended(servers_folder(config.run.path))
    processor = Processor(config.model.path, config.data)
    rewards = load_rewards(config.reward, config.data.reward_files())
    with closing(build_engine(config, processor)) as engine, closing(rewards):
        serve_folder(engine, config)
        metrics, _ = evaluate(
            engine,
            held_out_prompts(config, processor),
            rewards,
            max_new_tokens=config.rollout.sampling.max_new_tokens,
        )
    return metrics
