"""Answers in turns with a new picture after each: what the engine samples with is what is trained, and transformers' model."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from gspo_mm.batch import pack, sequences_of
from gspo_mm.config import DataConfig, PolicyConfig, RolloutConfig
from gspo_mm.data.processor import Processor
from gspo_mm.data.source import PromptSource
from gspo_mm.environment.conversation import conversations_of
from gspo_mm.families.folder import read_hf
from gspo_mm.policy.engine import Policy
from gspo_mm.rollout import embedded
from gspo_mm.rollout.embedded import EmbeddedEngine
from gspo_mm.types import EncodedPrompt, Finish, RolloutGroup, SamplingParams, Score
from tools.check_parity import compare

SAMPLING = SamplingParams(max_new_tokens=24)


@pytest.fixture(scope="module", params=["tiny_model", "tiny_hybrid_model", "tiny_windows_model"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def processor(folder: Path) -> Processor:
    return Processor(str(folder), DataConfig(train=["x"]))


@pytest.fixture(scope="module")
def prompts(processor: Processor, digit_shards: Path) -> list[EncodedPrompt]:
    data = DataConfig(train=[f"{digit_shards}/train-*.tar"])
    return PromptSource(data, processor, seed=0, split="train").take(3)


@pytest.fixture(scope="module")
def groups(folder: Path, processor: Processor, prompts: list[EncodedPrompt]) -> Iterator[list[RolloutGroup]]:
    """Three questions, two answers each. The random model is made to end about every fourth token its turn."""
    stop, original = processor.stop_token_ids[0], embedded.draw
    pictures = torch.tensor(
        sorted(processor.placeholder_ids)
    )  # which transformers' model would look for features for

    def draw(logits_BV: torch.Tensor, uniform_B: torch.Tensor, sampling: SamplingParams) -> Any:
        token_B, _ = original(logits_BV, uniform_B, sampling)
        token_B = torch.where(torch.isin(token_B, pictures), 5, token_B)
        token_B = torch.where(uniform_B * 7 % 1 < 0.25, stop, token_B)
        return token_B, logits_BV.log_softmax(-1).gather(1, token_B[:, None]).squeeze(1)

    config = RolloutConfig.model_validate(
        {
            "environment": {"python": "tests.environments:Shows", "args": {"last": 4}, "workers": 1},
            "sampling": {"max_new_tokens": SAMPLING.max_new_tokens},
        }
    )
    engine = EmbeddedEngine(
        str(folder),
        processor,
        dtype=torch.float32,
        max_batch=4,
        conversations=conversations_of(config, processor),
    )
    engine.load_weights(read_hf(folder, "auto"), version=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "draw", draw)
        answers = engine.generate(prompts, group_size=2, sampling=SAMPLING, seed=0)
    yield [
        RolloutGroup(
            id=number,
            prompt=prompt.prompt,
            prompt_ids=prompt.token_ids,
            completions=tuple(of_prompt),
            scores=(Score(value=1.0, parts={}), Score(value=0.0, parts={})),
            advantages=(0.5, -0.5),
        )
        for number, (prompt, of_prompt) in enumerate(zip(prompts, answers, strict=True))
    ]
    engine.close()


def test_answers_have_turns_until_they_are_complete_or_too_long(groups: list[RolloutGroup]) -> None:
    answers = [answer for group in groups for answer in group.completions]
    assert all(answer.fault is None for answer in answers)
    assert max(len(answer.turns) for answer in answers) == 4
    for answer in answers:
        assert len(answer.token_ids) <= SAMPLING.max_new_tokens
        if answer.finish is Finish.STOP:
            assert len(answer.turns) == 4
        else:
            assert len(answer.token_ids) == SAMPLING.max_new_tokens
        assert [bool(turn.observation) for turn in answer.turns] == [True] * (len(answer.turns) - 1) + [False]
        assert [o.text for o in answer.observations] == [f"look {i}" for i in range(1, len(answer.turns))]


def test_what_follows_a_turn_is_what_the_template_writes(
    groups: list[RolloutGroup], processor: Processor
) -> None:
    """Of words that are tokenised as they were sampled, the whole chat gives the same ids as its turns did."""
    for group in groups:
        for answer in group.completions:
            messages: list[dict[str, Any]] = [*map(dict, group.prompt.messages)]
            for turn in answer.turns:
                messages.append({"role": "assistant", "content": "A"})
                if seen := turn.observation:
                    text = {"type": "text", "text": seen.text}
                    messages.append({"role": "tool", "content": [{"type": "image"}, text]})
            images = [image for o in answer.observations for image in o.images]
            whole = processor.encode(
                replace(group.prompt, messages=tuple(messages[:-1]), images=(*group.prompt.images, *images))
            )
            (said,) = processor.encode_response("A")[:-1]
            expected = [*group.prompt_ids]
            for turn in answer.turns[:-1]:
                assert turn.observation
                expected += [said, turn.token_ids[-1], *turn.observation.token_ids]
            assert whole.token_ids == tuple(expected)


def test_packed_they_are_transformers_model_and_what_was_sampled_with(
    groups: list[RolloutGroup], processor: Processor, folder: Path, tmp_path: Path
) -> None:
    reference = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    policy = Policy.from_hf(
        str(folder), PolicyConfig.model_validate({"dtype": "float32"}), seed=0, total_steps=1
    )
    batch = pack(sequences_of(groups), processor)
    result = compare(policy, reference, [batch])
    assert result.max_abs_logprob < 2e-5
    assert result.max_rel_grad < 1e-4, result.worst_grad
    assert batch.rollout_logprobs is not None
    (logprobs,) = policy.logprobs([batch], temperature=1.0)
    assert (logprobs - batch.rollout_logprobs).abs().max() < 2e-5
