"""`gspo-mm eval`: held-out accuracy of a folder."""

from __future__ import annotations

from contextlib import closing

from gspo_mm.config import Config
from gspo_mm.evaluate import evaluate
from gspo_mm.reward.rewards import load_rewards
from gspo_mm.rollout.engine import opening_of
from gspo_mm.runtime.preempt import StopRequest
from gspo_mm.stages import held_out_prompts, processor_of, set_threads
from gspo_mm.sync.push import push_of


def evaluate_folder(config: Config) -> dict[str, float]:
    """Evaluate the model in `config.model.path` on `config.data.validation`, without a policy."""
    set_threads(config)
    opening = opening_of(config, StopRequest(), main=True)
    processor = processor_of(config)
    rewards = load_rewards(config.reward, config.data.reward_files())
    engine = opening.open(processor)
    assert engine
    with closing(engine), closing(rewards):
        push_of(config).serve_folder(config, engine)
        metrics, _ = evaluate(
            engine,
            held_out_prompts(config, processor, rewards),
            rewards,
            max_new_tokens=config.rollout.sampling.max_new_tokens,
            in_turns=config.rollout.environment is not None,
        )
    return metrics
