"""The judge at a real endpoint: SGLang speaks OpenAI's chat completions. Random weights judge at random, but to the form."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from gspo_mm.config import Config, RewardConfig
from gspo_mm.reward.rewards import Rewards, load_rewards
from gspo_mm.rollout.sglang import SGLangEngine
from gspo_mm.sync.sglang import SGLangPush
from gspo_mm.types import Completion, EncodedPrompt, Finish, RolloutGroup, Score

type Make = Callable[..., Rewards]


@pytest.fixture(scope="module", autouse=True)
def _weights(engine: SGLangEngine, config: Config) -> None:
    SGLangPush.serve_folder(config, engine)


@pytest.fixture
def make(engine: SGLangEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    (server,) = engine.fleet.up()
    made: list[Rewards] = []

    def load(key: str = server.api_key, **args: Any) -> Rewards:
        monkeypatch.setenv("JUDGE_KEY", key)
        args = {
            "url": f"{server.url}/v1",
            "model": "default",
            "key_env": "JUDGE_KEY",
            "rubric": "2: right. 0: not.",
            "scale": [0, 2],
            "reason": False,
            "max_tokens": 16,
            # random weights would fill JSON with white space for ever
            "structured": False,
            "extra": {"regex": r'\{"score": [012]\}'},
            "retries": 0,
            "cache": str(tmp_path / "verdicts.sqlite"),
            "price_in": 1e6,  # so that what a verdict cost is its tokens
        } | args
        part = {"name": "judge", "type": "judge", "accuracy": True, "args": args}
        (tmp_path / "reward.yaml").write_text(yaml.safe_dump({"name": "n", "parts": [part]}))
        made.append(load_rewards(RewardConfig(file=str(tmp_path / "reward.yaml"), workers=1), {}))
        return made[-1]

    yield load
    for rewards in made:
        rewards.close()


def scores(rewards: Rewards, prompt: EncodedPrompt, *texts: str) -> list[Score]:
    answers = tuple(
        Completion.of_one_turn(token_ids=(1,), logprobs=(0.0,), versions=(0,), finish=Finish.STOP, text=text)
        for text in texts
    )
    group = RolloutGroup(id=0, prompt=prompt.prompt, prompt_ids=prompt.token_ids, completions=answers)
    return list(rewards.score_groups([group])[0].scores)


def tokens(folder: Path) -> list[float]:
    """Prompt tokens of each verdict, as the server counted them."""
    with sqlite3.connect(folder / "verdicts.sqlite") as file:
        return [cost for (cost,) in file.execute("SELECT cost FROM verdicts")]


def test_verdicts_of_a_real_server_are_scores(
    make: Make, prompts: list[EncodedPrompt], tmp_path: Path
) -> None:
    with_image = next(p for p in prompts if len(p.prompt.images) == 1)
    texts = [f"It is a {digit}." for digit in range(6)]
    judged = scores(make(), with_image, *texts)
    assert [score.error for score in judged] == [None] * 6
    assert {score.value for score in judged} <= {0.0, 0.5, 1.0}
    assert len(tokens(tmp_path)) == 6
    again = scores(make(), with_image, *texts)
    assert [s.value for s in again] == [s.value for s in judged]
    assert len(tokens(tmp_path)) == 6


def test_the_server_holds_the_judge_to_the_form(
    make: Make, prompts: list[EncodedPrompt], tmp_path: Path
) -> None:
    scores(make(structured=True, extra={}), prompts[0], "seven", "eight")
    with sqlite3.connect(tmp_path / "verdicts.sqlite") as file:
        replies = [reply for (reply,) in file.execute("SELECT reply FROM verdicts")]
    assert len(replies) == 2
    for reply in replies:
        assert "".join(reply.split()).startswith('{"score"'), "what random weights alone never write"


def test_the_judge_sees_the_picture(make: Make, prompts: list[EncodedPrompt], tmp_path: Path) -> None:
    with_image = next(p for p in prompts if len(p.prompt.images) == 1)
    scores(make(images=False), with_image, "seven")
    (bare,) = tokens(tmp_path)
    scores(make(images=True), with_image, "seven")
    assert max(tokens(tmp_path)) > bare, "the picture's tokens come on top"


def test_a_wrong_key_and_an_overlong_request_are_failed_rewards(
    make: Make, prompts: list[EncodedPrompt]
) -> None:
    assert "answered 401" in str(scores(make(key="wrong"), prompts[0], "seven")[0].error)
    assert "answered 400" in str(scores(make(), prompts[0], "seven " * 500)[0].error)
