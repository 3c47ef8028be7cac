"""Weights on a real server: after every push it answers as the policy would, whatever way they took."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gspo_mm.batch import pack
from gspo_mm.config import Config
from gspo_mm.data.processor import Processor
from gspo_mm.policy.engine import Policy
from gspo_mm.rollout.embedded import EmbeddedEngine
from gspo_mm.rollout.sglang import SGLangEngine
from gspo_mm.sync.push import ServerPush, build_push
from gspo_mm.types import Completion, EncodedPrompt, SamplingParams, Sequence
from tests.sglang.conftest import MakeConfig

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=6)
MODES = ["disk", "distributed"]


@pytest.fixture(scope="module")
def policy(config: Config) -> Policy:
    return Policy.from_hf(config.model.path, config.policy, seed=0, total_steps=10)


@pytest.fixture(scope="module")
def embedded(config: Config, processor: Processor) -> EmbeddedEngine:
    return EmbeddedEngine(config.model.path, processor, dtype=torch.float32, max_batch=64)


@pytest.fixture(scope="module")
def some(prompts: list[EncodedPrompt]) -> list[EncodedPrompt]:
    """Two each with 0, 1, 2 and 3 images."""
    return prompts[:8]


@pytest.fixture
def push(
    request: pytest.FixtureRequest, make_config: MakeConfig, policy: Policy, engine: SGLangEngine
) -> Iterator[ServerPush]:
    """By the way that the test is parametrised with."""
    config = make_config(sync={"mode": request.param})
    push = build_push(config, policy, engine)
    assert isinstance(push, ServerPush)
    yield push
    push.close()


def perturb(policy: Policy, seed: int, part: str = "") -> None:
    """Other weights, in all of the policy or in the parameters whose names begin with `part`."""
    generator = torch.Generator().manual_seed(seed)
    changed = 0
    with torch.no_grad():
        for name in policy.weights.names():
            if name.startswith(part):
                parameter = policy.weights[name]
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
                changed += 1
    assert changed
    policy.forget_features()


def greedy(engine: SGLangEngine, prompts: list[EncodedPrompt]) -> list[Completion]:
    return [c for (c,) in engine.generate(prompts, group_size=1, sampling=GREEDY, seed=0)]


def logprobs(
    policy: Policy, processor: Processor, prompts: list[EncodedPrompt], answers: list[Completion]
) -> list[torch.Tensor]:
    sequences = [
        Sequence(
            name=prompt.prompt.key,
            prompt=prompt.prompt,
            token_ids=prompt.token_ids + answer.token_ids,
            prompt_length=len(prompt.token_ids),
        )
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return policy.logprobs([pack([sequence], processor) for sequence in sequences])


def gap(
    policy: Policy, processor: Processor, prompts: list[EncodedPrompt], answers: list[Completion]
) -> float:
    """The largest difference between the server's log-probs and the policy's."""
    ours = logprobs(policy, processor, prompts, answers)
    return max(
        (own - torch.tensor(answer.logprobs)).abs().max().item()
        for own, answer in zip(ours, answers, strict=True)
    )


@pytest.mark.parametrize("push", MODES, indirect=True)
def test_the_server_answers_as_the_policy_before_and_after_each_of_five_updates(
    push: ServerPush,
    policy: Policy,
    engine: SGLangEngine,
    embedded: EmbeddedEngine,
    processor: Processor,
    some: list[EncodedPrompt],
) -> None:
    seen = set()
    for version in range(1, 7):
        push.push(version=version)
        assert engine.version == version
        answers = greedy(engine, some)
        embedded.load_weights(policy.export(), version=version)
        expected = embedded.generate(some, group_size=1, sampling=GREEDY, seed=0)
        assert [a.token_ids for a in answers] == [e.token_ids for (e,) in expected]
        assert {v for answer in answers for v in answer.versions} == {version}
        assert gap(policy, processor, some, answers) <= 1e-4
        seen.add(tuple(a.logprobs for a in answers))
        perturb(policy, seed=version)
        assert gap(policy, processor, some, answers) > 1e-3, "the server cannot have these weights yet"
    assert len(seen) == 6
