"""Lay the sequences of a micro-batch end to end, every distinct image once.

Nothing is padded: sequences of any length stand side by side in N, told apart by `cu_seqlens`. Which sequences share
a micro-batch is decided in balance.py.

With `shares_prompts` neighbours that answer the same prompt are packed as a tree: the prompt once, behind it every answer
with the last token of the prompt before it, from which its first token is predicted.

    prompt, answer, prompt, answer   |ppppppaaa|ppppppbbbb|     one by one
    trees                            |pppppPaaaPbbbb|           5 + 4 + 5 tokens: P twice, since it predicts a and b

Tokens then cost as often as they are there: a group of G answers of B tokens after P takes P + G * B of them, not G * (P + B).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate, groupby
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from gspo_mm.types import EncodedImage, EncodedPrompt, MicroBatch, RolloutGroup, TrainSequence, Turn

_SAMPLED = -1  # no token's id


class Pixels(Protocol):
    """What packing needs of `data.Processor`."""

    def pixels(self, image: EncodedImage) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches [t*h*w, patch dim] float32 and grid [1, 3] int64 of one image."""
        ...

    def grid(self, image: EncodedImage) -> torch.Tensor:
        """The grid of one image, without decoding it."""
        ...

    def positions(self, token_ids: torch.Tensor, image_grid_thw: torch.Tensor | None) -> torch.Tensor:
        """Rotary positions [A, L] int64 of one sequence, in which an id below 0 is a text token."""
        ...


def sequences_of(groups: Iterable[RolloutGroup]) -> list[TrainSequence]:
    """One sequence per trainable completion; those whose reward failed or that are empty are left out."""
    return [
        replace(
            _flat(sequence_name(group, i), group.prompt_ids, group.prompt.images, completion.turns),
            advantage=group.advantages[i],
            rollout_logprobs=np.concatenate(
                [np.array(turn.logprobs, np.float32) for turn in completion.turns]
            ),
        )
        for group in groups
        for i, completion in enumerate(group.completions)
        if any(turn.token_ids for turn in completion.turns) and group.scores[i].error is None
    ]


def answered(prompt: EncodedPrompt, response: Iterable[int]) -> TrainSequence:
    """A prompt with a response that nobody sampled, or whose log-probs do not count, as if it had been sampled."""
    return demonstrated(prompt, (Turn(token_ids=tuple(response), logprobs=(), versions=(), text=""),))


def demonstrated(prompt: EncodedPrompt, turns: tuple[Turn, ...]) -> TrainSequence:
    """As `answered`, in turns."""
    return _flat(prompt.prompt.key, prompt.token_ids, prompt.prompt.images, turns)


def _flat(
    name: str, prompt_ids: tuple[int, ...], images: tuple[EncodedImage, ...], turns: tuple[Turn, ...]
) -> TrainSequence:
    """What was read and what was sampled, one after the other; nothing that follows the last sampled token."""
    runs = [(prompt_ids, False)]  # token ids and whether they were sampled
    seen = list(images)
    for number, turn in enumerate(turns):
        runs.append((turn.token_ids, True))
        if turn.observation and any(later.token_ids for later in turns[number + 1 :]):
            runs.append((turn.observation.token_ids, False))
            seen += turn.observation.images
    return TrainSequence(
        name=name,
        token_ids=np.concatenate([np.array(ids, np.int32) for ids, _ in runs]),
        trained=np.repeat([sampled for _, sampled in runs], [len(ids) for ids, _ in runs]),
        images=tuple(seen),
    )


def sequence_name(group: RolloutGroup, number: int) -> str:
    return f"group {group.id} completion {number} ({group.prompt.key})"


def pack(
    sequences: Sequence[TrainSequence], processor: Pixels, *, shares_prompts: bool = False
) -> MicroBatch:
    """One micro-batch; of no sequences an empty one, with which a rank takes part in what the others compute."""
    images = distinct_images(sequences)
    batch = without_pixels(sequences, processor, shares_prompts=shares_prompts)
    return replace(
        batch, pixel_values=torch.cat([processor.pixels(i)[0] for i in images]) if images else None
    )


def distinct_images(sequences: Iterable[TrainSequence]) -> list[EncodedImage]:
    """In the order in which they are first shown."""
    return list({image.key: image for sequence in sequences for image in sequence.images}.values())


def without_pixels(
    sequences: Sequence[TrainSequence], processor: Pixels, *, shares_prompts: bool = False
) -> MicroBatch:
    """As `pack`, with the pixels still to be made."""
    images = {image.key: number for number, image in enumerate(distinct_images(sequences))}
    grids: dict[str, torch.Tensor] = {}
    image_index: list[int] = []
    parts: list[tuple[NDArray[np.int32], torch.Tensor, torch.Tensor]] = []  # ids, positions, mask
    trees: list[tuple[int, ...]] = []
    for members in trees_of(sequences) if shares_prompts else [[sequence] for sequence in sequences]:
        first, shared = members[0], 0
        if len(members) > 1:
            shared = len(first.token_ids) - first.num_trained - 1
        for image in first.images:
            grids.setdefault(image.key, processor.grid(image))
            image_index.append(images[image.key])
        own = [grids[image.key] for image in first.images]
        longest = max(members, key=lambda sequence: len(sequence.token_ids))
        # a sampled token is text whatever its id, an image token that a model samples by mistake included
        read = torch.tensor(np.where(longest.trained, _SAMPLED, longest.token_ids), dtype=torch.int64)
        positions = processor.positions(read, torch.cat(own) if own else None)
        for sequence in members:
            assert sequence.trained[1:].any(), sequence.name
            assert not sequence.trained[0], sequence.name
            place = slice(0 if sequence is first else shared, len(sequence.token_ids))
            mask = torch.tensor(sequence.trained[place])
            parts.append((sequence.token_ids[place], positions[:, place], mask))
        branches = [len(sequence.token_ids) - shared for sequence in members]
        trees.append((shared, *branches) if shared else (branches[0],))
    no_positions = processor.positions(torch.empty(0, dtype=torch.int64), None)
    logprobs = [s.rollout_logprobs for s in sequences if s.rollout_logprobs is not None]
    return MicroBatch(
        names=tuple(s.name for s in sequences),
        token_ids=_joined([ids for ids, _, _ in parts], torch.int64),
        cu_seqlens=_offsets(map(sum, trees)),
        positions=torch.cat([no_positions, *(positions for _, positions, _ in parts)], dim=1),
        response_mask=torch.cat([torch.empty(0, dtype=torch.bool), *(mask for _, _, mask in parts)]),
        response_cu_seqlens=_offsets(s.num_trained for s in sequences),
        advantages=torch.tensor([s.advantage for s in sequences], dtype=torch.float32),
        rollout_logprobs=_joined(logprobs, torch.float32) if len(logprobs) == len(sequences) else None,
        pixel_values=None,
        image_grid_thw=torch.cat([grids[key] for key in images]) if images else None,
        image_keys=tuple(images),
        image_index=torch.tensor(image_index, dtype=torch.int64),
        trees=tuple(trees) if any(len(tree) > 1 for tree in trees) else (),
    )


def trees_of(sequences: Iterable[TrainSequence]) -> list[list[TrainSequence]]:
    """Neighbours that answer the same prompt in one turn, together where that saves pairs of attention as well as tokens.

    A tree's attention is one square of all its tokens: long answers would pay for each other.
    """
    trees: list[list[TrainSequence]] = []
    for _, neighbours in groupby(sequences, key=_prompt_of):
        members = list(neighbours)
        prompt = len(members[0].token_ids) - members[0].num_trained
        alone = sum(len(sequence.token_ids) ** 2 for sequence in members)
        if prompt > 1 and tokens_of(members) ** 2 <= alone:
            trees.append(members)
        else:
            trees += [[sequence] for sequence in members]
    return trees


def tokens_of(tree: Sequence[TrainSequence]) -> int:
    """How many tokens are packed for sequences of one prompt, which is there once, its last token before every answer."""
    shared = len(tree[0].token_ids) - tree[0].num_trained - 1 if len(tree) > 1 else 0
    return shared + sum(len(sequence.token_ids) - shared for sequence in tree)


def _prompt_of(sequence: TrainSequence) -> object:
    """Equal for sequences that read the same before their answer; other answers than of one turn are alone."""
    prompt = len(sequence.token_ids) - sequence.num_trained
    if sequence.trained[:prompt].any():
        return sequence.name
    return sequence.token_ids[:prompt].tobytes(), tuple(image.key for image in sequence.images)


def _joined(arrays: Sequence[NDArray[Any]], dtype: torch.dtype) -> torch.Tensor:
    return torch.cat([torch.empty(0, dtype=dtype), *(torch.tensor(array, dtype=dtype) for array in arrays)])


def _offsets(lengths: Iterable[int]) -> torch.Tensor:
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)
