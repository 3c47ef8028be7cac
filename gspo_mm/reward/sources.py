"""Which reward file judges which prompts: that of their source in data.train or data.validation, else reward.file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from gspo_mm.reward.spec import RewardFunction, load_reward
from gspo_mm.types import RolloutGroup


class Rewards:
    """Reward functions by source."""

    def __init__(self, default: RewardFunction, by_source: Mapping[str, RewardFunction]) -> None:
        self._default = default
        self._by_source = dict(by_source)

    def score_groups(self, groups: Iterable[RolloutGroup]) -> list[RolloutGroup]:
        """As `RewardFunction.score_groups`, each group by the file of its prompt's source."""
        groups = list(groups)
        scored: dict[int, RolloutGroup] = {}
        for function in dict.fromkeys([self._default, *self._by_source.values()]):
            places = [place for place, group in enumerate(groups) if self._of(group) is function]
            scored |= zip(places, function.score_groups(groups[place] for place in places), strict=True)
        return [scored[place] for place in range(len(groups))]

    def _of(self, group: RolloutGroup) -> RewardFunction:
        return self._by_source.get(group.prompt.source, self._default)


def load_rewards(default: str, by_source: Mapping[str, str]) -> Rewards:
    """Read all files, each once. Raises RewardFileError as `load_reward` does."""
    loaded = {path: load_reward(path) for path in {default, *by_source.values()}}
    return Rewards(loaded[default], {source: loaded[path] for source, path in by_source.items()})
