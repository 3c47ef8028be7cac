"""A model that takes text alone on a server of its own: it answers as the policy, whatever way new weights took."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gspo_mm.config import Config
from gspo_mm.data.processor import Processor
from gspo_mm.policy.engine import Policy
from gspo_mm.rollout.sglang import SGLangEngine
from gspo_mm.serving.fleet import Fleet
from gspo_mm.sync.parity import check_parity
from gspo_mm.sync.sglang import SGLangPush
from gspo_mm.types import EncodedPrompt, Prompt
from tests.sglang.conftest import MakeConfig
from tests.sglang.test_push import MODES, assert_follows
from tools.make_tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def text_config(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Config:
    path = tmp_path_factory.mktemp("text") / "qwen3_moe"
    make_tiny_model(path, family="qwen3_moe")
    return make_config("text", model={"path": str(path)})


@pytest.fixture(scope="module")
def reader(text_config: Config) -> Processor:
    return Processor(text_config.model.path, text_config.data)


@pytest.fixture(scope="module")
def questions(reader: Processor) -> list[EncodedPrompt]:
    return [
        reader.encode(
            Prompt(
                key=f"question {number}",
                messages=({"role": "user", "content": f"{number} + {7 * number} ="},),
                images=(),
                answer=8 * number,
                task="add",
            )
        )
        for number in range(8)
    ]


@pytest.fixture(scope="module")
def text_engine(text_config: Config, reader: Processor) -> Iterator[SGLangEngine]:
    engine = SGLangEngine(text_config, reader, Fleet(text_config))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def policy(text_config: Config) -> Policy:
    return Policy.from_hf(text_config.model.path, text_config.policy, seed=0, total_steps=1)


@pytest.mark.parametrize("mode", MODES)
def test_the_server_answers_as_the_policy_before_and_after_an_update(
    mode: str,
    text_config: Config,
    text_engine: SGLangEngine,
    policy: Policy,
    reader: Processor,
    questions: list[EncodedPrompt],
) -> None:
    config = text_config.model_copy(update={"sync": text_config.sync.model_copy(update={"mode": mode})})
    push = SGLangPush(config, policy, text_engine)
    assert_follows(push, policy, text_engine, reader, questions)
    push.push(version=3)
    gaps = check_parity(policy, text_engine, reader, questions, threshold=1e-4)
    assert set(gaps) == {"text", "response"}
    assert all(each.largest < 1e-4 and each.tokens > 50 for each in gaps.values())
    push.close()
