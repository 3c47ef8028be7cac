"""An answer in two turns, with a picture that came back between them: what is trained, counted, saved and shown."""

import json
import math
import re
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, Qwen3VLMoeModel

from gspo_mm.advantage import AdvantageResult, group_advantages
from gspo_mm.batch import pack, sequences_of
from gspo_mm.config import AdvantageConfig, DataConfig, LossConfig
from gspo_mm.data.processor import Processor
from gspo_mm.loss.gspo import policy_loss
from gspo_mm.observe.answers import call_metrics, rollout_metrics, sampled_tokens
from gspo_mm.observe.report import write_report
from gspo_mm.reward.pool import seen_by_parts
from gspo_mm.rollout.saved import decode_answers, encode_answers, load_rollouts, save_rollouts
from gspo_mm.rollout.scheduler import staleness_metrics
from gspo_mm.types import (
    Completion,
    EncodedImage,
    Finish,
    Look,
    Observation,
    Prompt,
    RolloutGroup,
    Score,
    Turn,
)
from tests.tars import image_bytes


def picture(width: int, height: int, seed: int) -> EncodedImage:
    data = image_bytes(Image.effect_noise((width, height), 60 + seed))
    return EncodedImage(data=data, key=EncodedImage.key_of(data), width=width, height=height)


@pytest.fixture(scope="module")
def processor(tiny_model: Path) -> Processor:
    return Processor(str(tiny_model), DataConfig(train=["x"]))


@pytest.fixture(scope="module")
def group(processor: Processor) -> RolloutGroup:
    """Two answers to a question with a picture: one in two turns with another picture between them, one in one."""

    def asked(text: str, image: EncodedImage) -> Prompt:
        content = [{"type": "image"}, {"type": "text", "text": text}]
        message = {"role": "user", "content": content}
        return Prompt(key=f"a.tar/{text}", messages=(message,), images=(image,), answer="7", task="t")

    question = processor.encode(asked("which", picture(64, 32, 0)))
    came_back = processor.encode(asked("closer", picture(32, 96, 1)))
    mistaken = processor.image_token_id  # a model may sample it; it is then text, and shows nothing
    turns = (
        Turn(
            token_ids=(5, mistaken, 9),
            logprobs=(-0.5, -1.5, -0.25),
            versions=(3, 3, 3),
            text="look closer",
            observation=Observation(
                token_ids=came_back.token_ids,
                images=came_back.prompt.images,
                text="here it is",
                look=Look(image=1, box=(0.5, -0.25, 0.75, 0.5)),
            ),
        ),
        Turn(token_ids=(8, 11), logprobs=(-2.0, -0.125), versions=(3, 4), text="seven"),
    )
    single = Turn(token_ids=(6, 7, 4), logprobs=(-1.0,) * 3, versions=(4,) * 3, text="six")
    return RolloutGroup(
        id=1,
        prompt=replace(question.prompt, pages=(picture(32, 32, 2),)),
        prompt_ids=question.token_ids,
        completions=(
            Completion(turns=turns, finish=Finish.STOP),
            Completion(turns=(single,), finish=Finish.LENGTH),
        ),
        scores=(
            Score(value=1.0, parts={"x": 1.0}, accuracy=1.0),
            Score(value=0.0, parts={"x": 0.0}, accuracy=0.0),
        ),
        advantages=(0.75, -0.5),
    )


def test_what_was_sampled_is_trained_and_what_came_back_is_read(group: RolloutGroup) -> None:
    two, one = sequences_of([group])
    (first, second), came_back = group.completions[0].turns, group.completions[0].observations[0]
    parts = group.prompt_ids, first.token_ids, came_back.token_ids, second.token_ids
    assert two.token_ids.tolist() == list(chain(*parts))
    read = [len(group.prompt_ids), len(came_back.token_ids)]
    assert two.trained.tolist() == [False] * read[0] + [True] * 3 + [False] * read[1] + [True] * 2
    assert two.num_trained == 5
    assert two.images == (*group.prompt.images, *came_back.images)
    assert two.rollout_logprobs is not None
    assert two.rollout_logprobs.tolist() == [-0.5, -1.5, -0.25, -2.0, -0.125]
    assert (one.num_trained, one.images) == (3, group.prompt.images)


def test_what_comes_back_after_the_last_sampled_token_is_left_out(group: RolloutGroup) -> None:
    completion = group.completions[0]
    for turns in [
        completion.turns[:1],
        (completion.turns[0], replace(completion.turns[1], token_ids=(), logprobs=(), versions=())),
    ]:
        changed = replace(group, completions=(replace(completion, turns=turns), group.completions[1]))
        two, _ = sequences_of([changed])
        assert two.token_ids.tolist() == [*group.prompt_ids, *completion.turns[0].token_ids]
        assert two.images == group.prompt.images


def test_positions_over_turns_are_those_of_transformers(
    group: RolloutGroup, processor: Processor, tiny_model: Path
) -> None:
    batch = pack(sequences_of([group]), processor)
    stub: Any = SimpleNamespace(config=AutoConfig.from_pretrained(tiny_model))
    stub.get_vision_position_ids = lambda *a, **k: Qwen3VLMoeModel.get_vision_position_ids(stub, *a, **k)
    grids = batch.image_grid_thw
    assert grids is not None
    assert batch.image_index.tolist() == [0, 1, 0]
    for number, shown in enumerate([grids, grids[:1]]):
        start, end = batch.cu_seqlens[number : number + 2].tolist()
        ids = batch.token_ids[start:end].masked_fill(batch.response_mask[start:end], 3)
        types = (ids == processor.image_token_id).int()[None]
        expected, _ = Qwen3VLMoeModel.get_rope_index(stub, ids[None], types, image_grid_thw=shown)
        assert torch.equal(batch.positions[:, start:end], expected[:, 0])


def turns_loss(
    group: RolloutGroup, table: torch.Tensor, old_R: torch.Tensor, config: LossConfig
) -> torch.Tensor:
    """By the equations, of a model that reads one token: [V, V] logits of the next token by the last one."""
    logprobs, old, objectives, lengths = table.log_softmax(-1), iter(old_R), [], []
    for completion, advantage in zip(group.completions, group.advantages, strict=True):
        last, gaps = group.prompt_ids[-1], []
        for turn in completion.turns:
            for token in turn.token_ids:
                gaps.append(logprobs[last, token] - next(old))
                last = token
            last = turn.observation.token_ids[-1] if turn.observation else last
        ratio, lengths = torch.stack(gaps).mean().exp(), [*lengths, len(gaps)]
        clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        objectives.append(torch.minimum(ratio * advantage, clipped * advantage))
    of_tokens = sum(o * length for o, length in zip(objectives, lengths, strict=True)) / sum(lengths)
    return -(of_tokens if config.aggregation == "token_mean" else torch.stack(objectives).mean())


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
@pytest.mark.parametrize("came_back", ["as it is", "one token of it", "fifty tokens more"])
def test_loss_and_gradient_are_the_formula_over_sampled_tokens(
    group: RolloutGroup, processor: Processor, aggregation: str, came_back: str
) -> None:
    """What came back is in them by its last token alone, which is all that this model reads of it."""
    config = LossConfig.model_validate({"clip_low": 0.002, "clip_high": 0.003, "aggregation": aggregation})
    generator, size = torch.Generator().manual_seed(1), len(processor._tokenizer)
    table = torch.randn(size, size, generator=generator, dtype=torch.float64, requires_grad=True)
    answer, other = group.completions
    (seen,) = answer.observations
    match came_back:
        case "one token of it":
            seen = replace(seen, token_ids=seen.token_ids[-1:], images=())
        case "fifty tokens more":
            seen = replace(seen, token_ids=(3,) * 50 + seen.token_ids)
    turns = (replace(answer.turns[0], observation=seen), answer.turns[1])
    batch = pack(sequences_of([replace(group, completions=(replace(answer, turns=turns), other))]), processor)
    (rows,) = batch.response_mask.nonzero(as_tuple=True)
    new_R = table.log_softmax(-1)[batch.token_ids[rows - 1], batch.token_ids[rows]]
    old_R = new_R.detach() + 0.002 * torch.randn(8, generator=generator, dtype=torch.float64)
    found = policy_loss(
        new_R,
        old_R,
        batch.advantages.double(),
        batch.response_cu_seqlens,
        config=config,
        num_sequences=2,
        num_tokens=8,
    ).loss
    expected = turns_loss(group, table, old_R, config)
    torch.testing.assert_close(found, expected, atol=1e-14, rtol=0)
    gradients = [torch.autograd.grad(loss, table)[0] for loss in (found, expected)]
    assert gradients[1].any()
    torch.testing.assert_close(*gradients, atol=1e-14, rtol=0)


def test_lengths_and_staleness_count_what_was_sampled(group: RolloutGroup) -> None:
    result = AdvantageResult(live=(group,), dead=0, failed=0)
    metrics = rollout_metrics([group], result)
    assert (metrics["length/mean"], metrics["length/max"]) == (4.0, 5)
    came_back = len(group.completions[0].observations[0].token_ids)
    assert sampled_tokens([group]) == 2 * len(group.prompt_ids) + came_back + 8
    assert staleness_metrics([group], 5)["rollout/staleness_max"] == 2
    assert group_advantages([group], AdvantageConfig()).live[0].advantages[0] > 0


def test_answers_with_and_without_a_call_are_told_apart(group: RolloutGroup) -> None:
    called, single = group.completions
    failed = Score(value=math.nan, parts={}, error="part judge: no connection")
    unmeasured = Score(value=0.5, parts={})
    scores = (*group.scores, unmeasured, failed)
    four = replace(group, completions=(called, single, called, single), scores=scores)
    assert call_metrics([four]) == {
        "turns/called": 0.5,
        "turns/reward_called": 0.75,
        "turns/accuracy_called": 1.0,
        "turns/reward_uncalled": 0.0,
        "turns/accuracy_uncalled": 0.0,
    }
    none = replace(group, completions=(single,), scores=(failed,))
    assert call_metrics([none]) == {"turns/called": 0.0}


def test_turns_are_saved_and_come_back_equal(group: RolloutGroup, tmp_path: Path) -> None:
    save_rollouts(tmp_path, 3, [group])
    assert load_rollouts(tmp_path, 3) == [group]
    assert len(list((tmp_path / "rollouts" / "images").iterdir())) == 3
    kept = json.loads(json.dumps(encode_answers(group)))  # in a checkpoint, which has no folder of images
    assert decode_answers(replace(group, completions=(), scores=()), kept) == group


def test_answers_saved_before_there_were_turns_can_be_read(group: RolloutGroup) -> None:
    old = {
        "token_ids": [6, 7],
        "logprobs": [-1.0, -2.0],
        "versions": [4, 4],
        "finish": "length",
        "text": "six",
    }
    (found,) = decode_answers(group, {"completions": [old], "scores": []}).completions
    assert found == Completion.of_one_turn(
        token_ids=(6, 7), logprobs=(-1.0, -2.0), versions=(4, 4), finish=Finish.LENGTH, text="six"
    )


def test_rewards_that_look_at_no_image_are_sent_none(group: RolloutGroup) -> None:
    for wanted in (False, True):
        prompt, completions = seen_by_parts(group.prompt, group.completions, images=wanted)
        images = [*prompt.pictures, *completions[0].observations[0].images]
        assert [bool(image.data) for image in images] == [wanted] * 3
        assert completions[0].text == "look closer\nseven"
        assert [len(c.token_ids) for c in completions] == [5, 3]
        assert completions[0].logprobs == completions[0].versions == ()


def test_the_report_shows_each_turn_and_what_came_back(group: RolloutGroup, tmp_path: Path) -> None:
    save_rollouts(tmp_path, 1, [group])
    (tmp_path / "metrics.jsonl").write_text("")
    page = write_report(tmp_path).read_text()
    places = [page.index(text) for text in ("look closer", "here it is", "seven")]
    assert places == sorted(places)
    assert page.count("of what came back") == 1


@pytest.mark.parametrize(
    ("box", "drawn"),
    [
        ((0.25, 0.5, 0.75, 0.625), ("box", 25, 50, 50, 12.5)),
        ((0.5, -0.25, 0.75, 0.5), ("box clipped", 50, 0, 25, 50)),
        ((-1, -1, 2, 2), ("box clipped", 0, 0, 100, 100)),
        ((2, 0.5, 3, 0.75), ("box clipped", 100, 50, 0, 25)),
        ((0.75, 0.75, 0.5, 0.5), ("box", 50, 50, 25, 25)),
    ],
    ids=["inside", "above", "around", "beside", "turned"],
)
@pytest.mark.parametrize("number", [1, 2])
def test_the_report_draws_the_box_that_a_turn_asked_for(
    group: RolloutGroup, tmp_path: Path, box: Any, drawn: tuple[Any, ...], number: int
) -> None:
    """On a picture of the question, or on one that came back before."""
    first, last = group.completions[0].turns
    seen = first.observation
    assert seen
    asked = replace(last, observation=replace(seen, look=Look(image=number, box=box)))
    turns = (replace(first, observation=replace(seen, look=None)), asked)
    answers = (replace(group.completions[0], turns=turns), group.completions[1])
    save_rollouts(tmp_path, 1, [replace(group, completions=answers)])
    (tmp_path / "metrics.jsonl").write_text("")
    page = write_report(tmp_path).read_text()
    ((of, name, style),) = re.findall(r'data-of="(.*?)".*?<div class="(box.*?)" style="(.*?)">', page)
    assert of == (group.prompt.images[0], seen.images[0])[number - 1].key
    assert f'data-key="{of}"' in page
    assert (name, *(float(value) for value in re.findall(r"([\d.]+)%", style))) == drawn


def test_a_box_on_a_picture_that_was_never_shown_is_not_drawn(group: RolloutGroup, tmp_path: Path) -> None:
    (first, last), other = group.completions[0].turns, group.completions[1]
    assert first.observation
    turn = replace(first, observation=replace(first.observation, look=Look(image=2, box=(0, 0, 1, 1))))
    save_rollouts(
        tmp_path, 1, [replace(group, completions=(replace(group.completions[0], turns=(turn, last)), other))]
    )
    (tmp_path / "metrics.jsonl").write_text("")
    assert "data-of=" not in write_report(tmp_path).read_text().split("<main>")[1].split("<script>")[0]
