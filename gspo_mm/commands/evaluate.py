"""`gspo-mm eval`: held-out accuracy of a folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from gspo_mm.config import Config
from gspo_mm.evaluate import evaluate
from gspo_mm.reward.rewards import load_rewards
from gspo_mm.rollout.engine import opening_of
from gspo_mm.runtime.disk import written_whole
from gspo_mm.runtime.preempt import StopRequest
from gspo_mm.stages import held_out_prompts, processor_of, set_threads
from gspo_mm.sync.push import push_of
from gspo_mm.types import RolloutGroup


def evaluate_folder(config: Config, save: Path | None = None) -> dict[str, float]:
    """Evaluate the model in `config.model.path` on `config.data.validation`, without a policy.

    `save`: a file for the answers, which `gspo-mm reward` reads.
    """
    if save:
        save.parent.mkdir(parents=True, exist_ok=True)
    set_threads(config)
    opening = opening_of(config, StopRequest(), main=True)
    processor = processor_of(config)
    rewards = load_rewards(config.reward, config.data.reward_files())
    engine = opening.open(processor)
    assert engine
    with closing(engine), closing(rewards):
        push_of(config).serve_folder(config, engine)
        metrics, groups = evaluate(
            engine,
            held_out_prompts(config, processor, rewards),
            rewards,
            max_new_tokens=config.rollout.sampling.max_new_tokens,
            in_turns=config.rollout.environment is not None,
        )
    if save:
        with written_whole(save) as file:
            file.write_text(_lines(groups))
    return metrics


def _lines(groups: Iterable[RolloutGroup]) -> str:
    """One JSON object for each answer."""
    lines = []
    for group in groups:
        prompt, (answer,), (score,) = group.prompt, group.completions, group.scores
        line = {
            "key": prompt.key,
            "task": prompt.task,
            "answer": prompt.answer,
            "response": answer.text,
            "tokens": len(answer.token_ids),
            "finish": answer.finish,
            "reward": None if score.error else score.value,
            "accuracy": score.accuracy,
            "parts": score.parts,
            "error": score.error,
            "meta": prompt.meta,
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines)
