"""Answers in turns on a real server: its tokens and log-probs are the policy's, also where a push came between the turns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_mm.batch import demonstrated
from gspo_mm.config import Config, RolloutConfig
from gspo_mm.data.processor import Processor
from gspo_mm.environment.conversation import Conversations, conversations_of
from gspo_mm.families.folder import read_hf
from gspo_mm.policy.engine import Policy
from gspo_mm.rollout.embedded import EmbeddedEngine
from gspo_mm.rollout.sglang import SGLangEngine
from gspo_mm.sync.push import push_of
from gspo_mm.types import Completion, EncodedPrompt, EncodedTurn, SamplingParams
from tests.sglang.ties import logprobs_and_comparable
from tests.waiting import eventually

SAMPLING = SamplingParams(max_new_tokens=24)


class EndsOften(Processor):
    """Every fifth token ends a turn of the random model, as if it were the one that the template ends turns with."""

    def __init__(self, config: Config) -> None:
        super().__init__(config.model.path, config.data)
        self._end = self.stop_token_ids[0]
        reserved = {*self.placeholder_ids, *self._tokenizer.all_special_ids}
        self.stop_token_ids = (self._end, *(set(range(0, 400, 5)) - reserved))

    def encode_turn(self, messages: Any, turns: Any, *args: Any, **kwargs: Any) -> EncodedTurn | None:
        ended = replace(turns[-1], token_ids=(*turns[-1].token_ids[:-1], self._end))
        return super().encode_turn(messages, [*turns[:-1], ended], *args, **kwargs)


@pytest.fixture(scope="module")
def often(config: Config) -> EndsOften:
    return EndsOften(config)


def conversations(processor: Processor, python: str, **args: Any) -> Conversations:
    environment = {"python": f"tests.environments:{python}", "args": args, "workers": 1}
    values = {"environment": environment, "sampling": {"max_new_tokens": SAMPLING.max_new_tokens}}
    found = conversations_of(RolloutConfig.model_validate(values), processor)
    assert found
    return found


@pytest.fixture
def in_turns(engine: SGLangEngine, often: EndsOften) -> Iterator[SGLangEngine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_conversations", conversations(often, "Shows", last=4))
        patch.setattr(engine, "_processor", often)
        yield engine
        engine._conversations.close()  # pyright: ignore[reportOptionalMemberAccess]


def policy_of(config: Config) -> Policy:
    return Policy.from_hf(config.model.path, config.policy, seed=0, total_steps=1)


def logprobs_of(
    policy: Policy, prompt: EncodedPrompt, answers: list[Completion], processor: Processor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Over all sampled tokens of the answers in order, [R] of the policy, and [R] whether a server must have the same."""
    sequences = [demonstrated(prompt, answer.turns) for answer in answers]
    found = [logprobs_and_comparable(policy, processor, sequence) for sequence in sequences]
    return torch.cat([own for own, _ in found]), torch.cat([comparable for _, comparable in found])


def test_turns_of_a_server_are_the_policys(
    in_turns: SGLangEngine, config: Config, often: EndsOften, prompts: list[EncodedPrompt]
) -> None:
    push_of(config).serve_folder(config, in_turns)
    policy = policy_of(config)
    asked = prompts[:6]
    in_turns.take_counts()
    compared = []
    for prompt, answers in zip(
        asked, in_turns.generate(asked, group_size=2, sampling=SAMPLING, seed=0), strict=True
    ):
        found, comparable = logprobs_of(policy, prompt, answers, often)
        sampled = torch.tensor([logprob for answer in answers for logprob in answer.logprobs])
        assert not ((found - sampled).abs() > 1e-4)[comparable].any()
        compared.append(comparable)
    assert torch.cat(compared).float().mean() > 0.5
    assert in_turns.take_counts()["turns/cached_fraction"] > 0.9


def test_greedy_turns_of_a_server_are_those_of_the_embedded_engine(
    in_turns: SGLangEngine, config: Config, often: EndsOften, prompts: list[EncodedPrompt]
) -> None:
    push_of(config).serve_folder(config, in_turns)
    led = conversations(often, "Shows", last=4)
    embedded = EmbeddedEngine(config.model.path, often, dtype=torch.float32, max_batch=8, conversations=led)
    embedded.load_weights(read_hf(config.model.path, "auto"), version=0)
    greedy = replace(SAMPLING, temperature=0.0)
    served = in_turns.generate(prompts[:6], group_size=1, sampling=greedy, seed=0)
    ours = embedded.generate(prompts[:6], group_size=1, sampling=greedy, seed=0)
    embedded.close()
    turns = [[[t.token_ids for t in answer.turns] for (answer,) in answers] for answers in (served, ours)]
    assert turns[0] == turns[1]
    assert max(map(len, turns[0])) > 1


def test_a_push_between_two_turns_is_one_within_an_answer(
    in_turns: SGLangEngine, config: Config, often: EndsOften, prompts: list[EncodedPrompt], tmp_path: Path
) -> None:
    push_of(config).serve_folder(config, in_turns)
    policy = policy_of(config)
    push = push_of(config)(config, policy, in_turns)
    push.push(version=7)
    led = conversations(often, "Waits", folder=str(tmp_path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_turns, "_conversations", led)
        under_way = in_turns.start(prompts[1], 2, SAMPLING)
        eventually(lambda: (tmp_path / "waiting").exists())
        before = [p.detach().clone() for p in policy.parameters()]
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(
                    0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
                )
        policy.forget_features()
        push.push(version=8)
        (tmp_path / "go").touch()
        answers = under_way.result(timeout=60)
        led.close()
    later, first = logprobs_of(policy, prompts[1], answers, often)
    with torch.no_grad():
        for parameter, old in zip(policy.parameters(), before, strict=True):
            parameter.copy_(old)
    policy.forget_features()
    earlier, second = logprobs_of(policy, prompts[1], answers, often)
    versions = torch.tensor([version for answer in answers for version in answer.versions])
    sampled = torch.tensor([logprob for answer in answers for logprob in answer.logprobs])
    assert set(versions.tolist()) == {7, 8}
    assert [{*turn.versions} for answer in answers for turn in answer.turns] == [{7}, {8}] * 2
    off = (torch.where(versions == 7, earlier, later) - sampled).abs() > 1e-4
    assert not off[first & second].any()
    assert (earlier - later).abs().max() > 1e-2
    push.close()
