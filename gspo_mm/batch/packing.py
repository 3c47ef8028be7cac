"""Lay the sequences of a micro-batch end to end, every distinct image once.

Nothing is padded: sequences of any length stand side by side in N, told apart by `cu_seqlens`. Which sequences share
a micro-batch is decided in balance.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from typing import Protocol

import torch

from gspo_mm.types import EncodedImage, MicroBatch, RolloutGroup, Sequence


class Pixels(Protocol):
    """What packing needs of `data.Processor`."""

    def pixels(self, image: EncodedImage) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches [t*h*w, patch dim] float32 and grid [1, 3] int64 of one image."""
        ...

    def num_patches(self, image: EncodedImage) -> int:
        """t*h*w of one image, without decoding it."""
        ...

    def positions(self, token_ids: torch.Tensor, image_grid_thw: torch.Tensor | None) -> torch.Tensor:
        """Rotary positions [3, L] int64 of one sequence."""
        ...


def sequences_of(groups: Iterable[RolloutGroup]) -> list[Sequence]:
    """One Sequence per trainable completion; those whose reward failed or that are empty are left out."""
    return [
        Sequence(
            name=sequence_name(group, i),
            prompt=group.prompt,
            token_ids=group.prompt_ids + completion.token_ids,
            prompt_length=len(group.prompt_ids),
            advantage=group.advantages[i],
            rollout_logprobs=completion.logprobs,
        )
        for group in groups
        for i, completion in enumerate(group.completions)
        if completion.token_ids and group.scores[i].error is None
    ]


def sequence_name(group: RolloutGroup, number: int) -> str:
    return f"group {group.id} completion {number} ({group.prompt.key})"


def pack(sequences: list[Sequence], processor: Pixels) -> MicroBatch:
    """One micro-batch; of no sequences an empty one, with which a rank takes part in what the others compute."""
    images: dict[str, int] = {}  # content hash -> index among the distinct images
    pixels: list[torch.Tensor] = []
    grids: list[torch.Tensor] = []
    image_index: list[int] = []
    positions: list[torch.Tensor] = []
    masks: list[torch.Tensor] = []
    for sequence in sequences:
        assert 0 < sequence.prompt_length < len(sequence.token_ids), sequence.name
        for image in sequence.prompt.images:
            if image.key not in images:
                images[image.key] = len(images)
                patches, grid = processor.pixels(image)
                pixels.append(patches)
                grids.append(grid)
            image_index.append(images[image.key])
        own = [grids[images[image.key]] for image in sequence.prompt.images]
        prompt = torch.tensor(sequence.token_ids[: sequence.prompt_length])
        response_length = len(sequence.token_ids) - sequence.prompt_length
        positions.append(
            extend_positions(processor.positions(prompt, torch.cat(own) if own else None), response_length)
        )
        masks.append(torch.arange(len(sequence.token_ids)) >= sequence.prompt_length)
    has_logprobs = all(s.rollout_logprobs is not None for s in sequences)
    return MicroBatch(
        names=tuple(s.name for s in sequences),
        token_ids=torch.tensor([t for s in sequences for t in s.token_ids], dtype=torch.int64),
        cu_seqlens=_offsets(len(s.token_ids) for s in sequences),
        positions=torch.cat([torch.empty(3, 0, dtype=torch.int64), *positions], dim=1),
        response_mask=torch.cat([torch.empty(0, dtype=torch.bool), *masks]),
        response_cu_seqlens=_offsets(len(s.token_ids) - s.prompt_length for s in sequences),
        advantages=torch.tensor([s.advantage for s in sequences], dtype=torch.float32),
        rollout_logprobs=torch.tensor(
            [x for s in sequences for x in s.rollout_logprobs or ()], dtype=torch.float32
        )
        if has_logprobs
        else None,
        pixel_values=torch.cat(pixels) if pixels else None,
        image_grid_thw=torch.cat(grids) if grids else None,
        image_keys=tuple(images),
        image_index=torch.tensor(image_index, dtype=torch.int64),
    )


def extend_positions(prompt_positions: torch.Tensor, length: int) -> torch.Tensor:
    """Continue rotary positions [3, P] by `length` sampled tokens: all three axes count on from the largest.

    Sampled tokens are text whatever their id, an image token that a model samples by mistake included.
    """
    start = int(prompt_positions.max()) + 1
    return torch.cat([prompt_positions, torch.arange(start, start + length).expand(3, -1)], dim=1)


def _offsets(lengths: Iterable[int]) -> torch.Tensor:
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)
