"""Packing lays sequences end to end and changes nothing about them."""

import numpy as np
import torch

from gspo_mm.batch import pack, sequences_of
from gspo_mm.policy.attention import seen
from gspo_mm.types import Completion, EncodedImage, Finish, Prompt, RolloutGroup, Score, TrainSequence


class FakePixels:
    """Grids of one image token; remembers which images were asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def pixels(self, image: EncodedImage) -> tuple[torch.Tensor, torch.Tensor]:
        self.asked.append(image.key)
        return torch.full((4, 3), float(image.width)), torch.tensor([[1, 2, 2]])

    def grid(self, image: EncodedImage) -> torch.Tensor:
        return torch.tensor([[1, 2, 2]])

    def positions(self, token_ids: torch.Tensor, image_grid_thw: torch.Tensor | None) -> torch.Tensor:
        images = 0 if image_grid_thw is None else len(image_grid_thw)
        return (torch.arange(len(token_ids)) + 100 * images).expand(3, -1)


def image(n: int) -> EncodedImage:
    return EncodedImage(data=bytes([n]), key=EncodedImage.key_of(bytes([n])), width=n, height=n)


def prompt(*images: EncodedImage) -> Prompt:
    return Prompt(key="k", messages=(), images=images, answer="1", task="t")


def sequence(
    tokens: list[int], prompt_length: int, *images: EncodedImage, advantage: float = 0.0
) -> TrainSequence:
    return TrainSequence(
        name=str(tokens[0]),
        token_ids=np.array(tokens, np.int32),
        trained=np.arange(len(tokens)) >= prompt_length,
        images=images,
        advantage=advantage,
        rollout_logprobs=-np.array(tokens[prompt_length:], np.float32),
    )


def test_tokens_masks_and_offsets_follow_the_sequences() -> None:
    batch = pack(
        [sequence([1, 2, 3], 1, advantage=0.5), sequence([4, 5, 6, 7], 3, advantage=-2.0)], FakePixels()
    )
    assert batch.token_ids.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert batch.cu_seqlens.tolist() == [0, 3, 7]
    assert batch.token_ids[batch.response_mask].tolist() == [2, 3, 7]
    assert batch.response_cu_seqlens.tolist() == [0, 2, 3]
    assert batch.advantages.tolist() == [0.5, -2.0]
    assert batch.rollout_logprobs is not None
    assert batch.rollout_logprobs.tolist() == [-2.0, -3.0, -7.0]
    assert batch.positions[0].tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert (batch.num_sequences, batch.num_tokens, batch.num_response_tokens) == (2, 7, 3)
    assert batch.pixel_values is None


def test_equal_images_are_packed_once_and_indexed_in_token_order() -> None:
    pixels = FakePixels()
    a, b = image(1), image(2)
    batch = pack(
        [sequence([1, 2], 1, a), sequence([3, 4], 1, b, a), sequence([5, 6], 1), sequence([7, 8], 1, b)],
        pixels,
    )
    assert pixels.asked == [a.key, b.key]
    assert batch.image_index.tolist() == [0, 1, 0, 1]
    assert batch.pixel_values is not None
    assert batch.pixel_values[:, 0].tolist() == [1.0] * 4 + [2.0] * 4
    assert batch.image_grid_thw is not None
    assert len(batch.image_grid_thw) == 2
    assert batch.positions[0].tolist() == [100, 101, 200, 201, 0, 1, 100, 101]


def test_no_sequences_make_an_empty_micro_batch() -> None:
    batch = pack([], FakePixels())
    assert batch.num_sequences == batch.num_tokens == batch.num_response_tokens == 0
    assert batch.cu_seqlens.tolist() == batch.response_cu_seqlens.tolist() == [0]
    assert batch.positions.shape == (3, 0)
    assert batch.token_ids.dtype is torch.int64


def test_completions_without_a_score_or_without_tokens_are_not_trained_on() -> None:
    def completion(*tokens: int) -> Completion:
        count = len(tokens)
        return Completion.of_one_turn(
            token_ids=tokens, logprobs=(-1.0,) * count, versions=(0,) * count, finish=Finish.STOP, text=""
        )

    group = RolloutGroup(
        id=7,
        prompt=prompt(),
        prompt_ids=(1, 2),
        completions=(completion(3), completion(4, 5), completion()),
        scores=(
            Score(value=1.0, parts={}),
            Score(value=0.0, parts={}, error="broke"),
            Score(value=0.0, parts={}),
        ),
        advantages=(0.5, 0.0, -0.5),
    )
    (only,) = sequences_of([group])
    assert only.token_ids.tolist() == [1, 2, 3]
    assert only.trained.tolist() == [False, False, True]
    assert only.advantage == 0.5
    assert only.name == "group 7 completion 0 (k)"


def test_answers_to_one_prompt_stand_behind_one_copy_of_it() -> None:
    a, asked = image(1), [*range(1, 9)]
    members = [sequence([*asked, *answer], 8, a, advantage=answer[0]) for answer in ([15], [16, 17], [18])]
    other = sequence([1, 2, 3, 9], 3, a)
    pixels = FakePixels()
    batch = pack([*members, other], pixels, shares_prompts=True)
    assert batch.trees == ((7, 2, 3, 2), (4,))
    assert batch.cu_seqlens.tolist() == [0, 14, 18]
    assert batch.token_ids.tolist() == [*asked, 15, 8, 16, 17, 8, 18, 1, 2, 3, 9]
    places = [*range(9), 7, 8, 9, 7, 8, *range(4)]
    assert batch.positions[0].tolist() == [100 + place for place in places]
    assert batch.token_ids[batch.response_mask].tolist() == [15, 16, 17, 18, 9]
    assert batch.response_cu_seqlens.tolist() == [0, 1, 3, 4, 5]
    assert batch.advantages.tolist() == [15.0, 16.0, 18.0, 0.0]
    assert batch.image_index.tolist() == [0, 0]  # of the first prompt once
    assert pixels.asked == [a.key]
    assert pack([*members, other], FakePixels()).trees == ()


def test_long_answers_and_answers_in_turns_do_not_share_their_prompt() -> None:
    long = [sequence([1, 2, *range(3 + n, 20)], 2) for n in (0, 1)]
    turns = [sequence([1, 2, 3, 4, 5 + n, 6, 7], 4) for n in (0, 1)]
    for each in turns:
        each.trained[5] = False
    for members in (long, turns):
        batch = pack(members, FakePixels(), shares_prompts=True)
        assert batch.trees == ()
        assert batch.num_tokens == sum(len(each.token_ids) for each in members)


def test_what_a_token_of_a_tree_sees() -> None:
    # two tokens that are shared, then branches of two and of one
    assert seen((2, 2, 1), None).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    # with a window of two, the second branch's token still follows the shared ones
    assert seen((2, 2, 1), 2).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 1, 0, 0, 1],
    ]
