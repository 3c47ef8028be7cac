"""`gspo-mm preflight`: what `train` does before its first step, alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import closing

from gspo_mm.commands.references import References
from gspo_mm.config import Config
from gspo_mm.data.source import PromptSource
from gspo_mm.inputs import check_answers
from gspo_mm.reward.rewards import load_rewards
from gspo_mm.runtime.dist import Ranks
from gspo_mm.stages import build_stages, check_servers, processor_of
from gspo_mm.sync.parity import Gap


def preflight_prompts(config: Config, *, everything: bool = False) -> str:
    """Read the first training prompts and have their parts look at their answers; says what they are like.

    With `everything` all samples of both splits are read, and their reference answers scored. Raises DataError naming
    samples whose answers cannot be judged, or RewardFileError for a task that no part covers.
    """
    processor = processor_of(config)
    with closing(load_rewards(config.reward, config.data.reward_files())) as rewards:
        if everything:
            references = References(config, rewards, processor)
            checked = check_answers(config, rewards, everything=True, on_prompt=references.add)
            checked += f"\n{references.describe()}"
        else:
            checked = check_answers(config, rewards)
        source = PromptSource(
            config.data, processor, seed=config.run.seed, split="train", check=rewards.check
        )
        with closing(source):
            prompts = source.take(config.rollout.prompts_per_step)
    tasks = Counter(each.prompt.task for each in prompts)
    return (
        f"{checked}\nthe first {len(prompts)} prompts can be used: "
        f"{', '.join(f'{n} {task}' for task, n in tasks.most_common())}; "
        f"{max(len(each.token_ids) for each in prompts)} tokens in the longest"
    )


def preflight_servers(config: Config) -> Mapping[str, Gap]:
    """Start everything that a run needs, bring the weights to the servers and compare them with the policy."""
    stages = build_stages(config, Ranks(), total_steps=1)
    with stages.closing():
        stages.weights.push(version=0)
        return check_servers(config, stages)
