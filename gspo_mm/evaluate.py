"""Greedy answers to held-out prompts, judged by the reward file."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from contextlib import closing
from statistics import fmean

from gspo_mm.config import Config
from gspo_mm.reward.sources import Rewards, describe_failures, failed_fraction, load_rewards
from gspo_mm.rollout.engine import RolloutEngine, sample_groups
from gspo_mm.types import EncodedPrompt, RolloutGroup, SamplingParams

logger = logging.getLogger(__name__)


def evaluate(
    engine: RolloutEngine, prompts: list[EncodedPrompt], reward: Rewards, *, max_new_tokens: int
) -> tuple[dict[str, float], list[RolloutGroup]]:
    """Metrics {"eval/accuracy", "eval/reward", "eval/accuracy/<task>", "eval/failed"} and the scored answers, one per prompt.

    Means are over the answers that were judged; what none of them measures is left out. `eval/failed` says how many of
    all were not.
    """
    sampling = SamplingParams(temperature=0.0, max_new_tokens=max_new_tokens)
    groups = sample_groups(engine, prompts, group_size=1, sampling=sampling, seed=0, first_id=0)
    groups = reward.score_groups(groups)
    if failures := describe_failures(groups, what="held-out answers"):
        logger.warning(failures)
    judged = [(group.prompt.task, group.scores[0]) for group in groups if group.scores[0].error is None]
    right: dict[str, list[float]] = defaultdict(list)
    for task, score in judged:
        if score.accuracy is not None:
            right[task].append(score.accuracy)
    values = {
        "eval/accuracy": [x for of_task in right.values() for x in of_task],
        "eval/reward": [score.value for _, score in judged],
        **{f"eval/accuracy/{task}": of_task for task, of_task in sorted(right.items())},
    }
    metrics = {name: fmean(each) for name, each in values.items() if each}
    return metrics | {"eval/failed": failed_fraction(groups)}, groups


def describe_accuracy(metrics: Mapping[str, float]) -> str:
    """ "held-out accuracy 52.0 %", or why there is none."""
    if "eval/accuracy" in metrics:
        return f"held-out accuracy {100 * metrics['eval/accuracy']:.1f} %"
    reason = (
        "the reward of every answer failed" if metrics["eval/failed"] == 1 else "no part measures these tasks"
    )
    return f"held-out accuracy cannot be measured: {reason}"


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
            held_out_prompts(config, processor, rewards),
            rewards,
            max_new_tokens=config.rollout.sampling.max_new_tokens,
        )
    return metrics
