"""`gspo-mm eval`: held-out accuracy of a folder."""

from __future__ import annotations

from contextlib import closing

from gspo_mm.config import Config
from gspo_mm.data.processor import Processor
from gspo_mm.evaluate import evaluate
from gspo_mm.reward.sources import load_rewards
from gspo_mm.rollout.registry import forget_ended, servers_folder
from gspo_mm.stages import build_engine, held_out_prompts, set_threads
from gspo_mm.sync.push import serve_folder


def evaluate_folder(config: Config) -> dict[str, float]:
    """Evaluate the model in `config.model.path` on `config.data.validation`, without a policy."""
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
