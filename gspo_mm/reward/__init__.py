"""Rewards: a YAML file (`spec`) composes small pure functions (`text`, `grounding`) into one scalar."""

from gspo_mm.reward.spec import RewardFileError, RewardFunction, load_reward

__all__ = ["RewardFileError", "RewardFunction", "load_reward"]
