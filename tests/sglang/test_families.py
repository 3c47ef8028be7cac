"""GLM-4.5V on a server of its own: experts by sigmoid scores and a bias, a shared expert, a dense layer first.

Costs one server start.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gspo_mm.config import Config
from gspo_mm.data.processor import Processor
from gspo_mm.policy.engine import Policy
from gspo_mm.rollout.sglang import SGLangEngine
from gspo_mm.serving.fleet import Fleet
from gspo_mm.sync.sglang import SGLangPush
from gspo_mm.types import EncodedPrompt
from tests.sglang.conftest import MakeConfig
from tests.sglang.test_push import assert_follows
from tools.make_tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def sigmoid_config(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Config:
    path = tmp_path_factory.mktemp("sigmoid") / "glm4v_moe"
    make_tiny_model(path, family="glm4v_moe", text={"routed_scaling_factor": 1.5})
    # pictures of 64 x 64 are scaled down by both sides
    return make_config("sigmoid", model={"path": str(path)}, data={"max_pixels": 48 * 48})


@pytest.fixture(scope="module")
def reader(sigmoid_config: Config) -> Processor:
    return Processor(sigmoid_config.model.path, sigmoid_config.data)


@pytest.fixture(scope="module")
def engine(sigmoid_config: Config, reader: Processor) -> Iterator[SGLangEngine]:
    engine = SGLangEngine(sigmoid_config, reader, Fleet(sigmoid_config))
    yield engine
    engine.close()


def test_the_server_answers_as_the_policy_before_and_after_an_update(
    sigmoid_config: Config, engine: SGLangEngine, reader: Processor, prompts: list[EncodedPrompt]
) -> None:
    some = [reader.encode(each.prompt) for each in prompts[:8]]
    policy = Policy.from_hf(sigmoid_config.model.path, sigmoid_config.policy, seed=0, total_steps=1)
    push = SGLangPush(sigmoid_config, policy, engine)
    assert_follows(push, policy, engine, reader, some)
    push.close()
