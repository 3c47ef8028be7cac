"""Greedy answers to held-out prompts, judged by the reward file."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from statistics import fmean

from gspo_mm.observe.answers import call_metrics
from gspo_mm.reward.rewards import Rewards, describe_failures, failed_fraction
from gspo_mm.rollout.engine import RolloutEngine, sample_groups
from gspo_mm.types import EncodedPrompt, RolloutGroup, SamplingParams

logger = logging.getLogger(__name__)


def evaluate(
    engine: RolloutEngine,
    prompts: list[EncodedPrompt],
    reward: Rewards,
    *,
    max_new_tokens: int,
    in_turns: bool = False,
) -> tuple[dict[str, float], list[RolloutGroup]]:
    """Metrics {"eval/accuracy", "eval/accuracy/<task>", "eval/judged", "eval/reward", "eval/failed"}, and the scored answers.

    One answer per prompt. `in_turns`, with rollout.environment: also the metrics of calls, {"eval/turns/..."}.

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
    if right:
        metrics["eval/judged"] = len(values["eval/accuracy"])
    if in_turns:
        metrics |= {f"eval/{name}": value for name, value in call_metrics(groups).items()}
    return metrics | {"eval/failed": failed_fraction(groups)}, groups


def describe_accuracy(metrics: Mapping[str, float]) -> str:
    """ "held-out accuracy 52.0 %", or why there is none."""
    if "eval/accuracy" in metrics:
        return f"held-out accuracy {100 * metrics['eval/accuracy']:.1f} %"
    reason = (
        "the reward of every answer failed" if metrics["eval/failed"] == 1 else "no part measures these tasks"
    )
    return f"held-out accuracy cannot be measured: {reason}"
