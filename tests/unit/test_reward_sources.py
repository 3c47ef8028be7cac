"""Every group is judged by the reward file of its source."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from gspo_mm.config import ConfigError, RewardConfig, parse_config
from gspo_mm.reward.rewards import load_rewards
from gspo_mm.reward.spec import RewardFileError
from gspo_mm.types import Completion, Finish, Prompt, RolloutGroup


def reward_file(path: Path, pattern: str) -> str:
    path.write_text(f"name: {path.stem}\nparts: [{{name: f, type: format, args: {{pattern: {pattern}}}}}]\n")
    return str(path)


def group(number: int, source: str, text: str) -> RolloutGroup:
    prompt = Prompt(key=str(number), messages=(), images=(), answer="", task="t", source=source)
    answer = Completion.of_one_turn(
        token_ids=(1,), logprobs=(-0.5,), versions=(0,), finish=Finish.STOP, text=text
    )
    return RolloutGroup(id=number, prompt=prompt, prompt_ids=(1,), completions=(answer,))


def test_groups_keep_their_order_and_get_the_reward_of_their_source(tmp_path: Path) -> None:
    a, b = reward_file(tmp_path / "a.yaml", "a"), reward_file(tmp_path / "b.yaml", "b")
    groups = [group(i, source, "b") for i, source in enumerate(["maps", "", "charts", "maps", "other"])]
    with closing(load_rewards(RewardConfig(file=a), {"maps": b, "charts": a})) as rewards:
        scored = rewards.score_groups(groups)
        assert rewards.score_groups([]) == []
    assert [g.id for g in scored] == [0, 1, 2, 3, 4]
    assert [g.scores[0].value for g in scored] == [1.0, 0.0, 0.0, 1.0, 0.0]
    assert all(not g.scores for g in groups), "the groups given are not edited"


def test_a_file_of_a_source_is_checked_like_the_default(tmp_path: Path) -> None:
    a = reward_file(tmp_path / "a.yaml", "a")
    with pytest.raises(RewardFileError, match=r"missing\.yaml does not exist"):
        load_rewards(RewardConfig(file=a), {"maps": str(tmp_path / "missing.yaml")})


def data(train: list[object], validation: list[object]) -> dict[str, object]:
    return {
        "run": {"name": "r"},
        "model": {"path": "m"},
        "data": {"train": train, "validation": validation},
        "reward": {"file": "r.yaml"},
    }


def test_files_are_those_that_sources_name() -> None:
    maps, charts = {"name": "maps", "shards": ["a"], "reward": "m.yaml"}, {"name": "charts", "shards": ["b"]}
    config = parse_config(data([maps, charts], [maps | {"shards": ["c"]}]))
    assert config.data.reward_files() == {"maps": "m.yaml"}
    assert parse_config(data(["a"], ["b"])).data.reward_files() == {}
    with pytest.raises(
        ConfigError, match=r"source maps has reward=m\.yaml in data\.train and reward=None in data\.valid"
    ):
        parse_config(data([maps], [maps | {"shards": ["c"], "reward": None}]))
