"""Answers to common prompts, of random pixels and fixed tokens: what `shares_prompts` packs as trees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gspo_mm.families.table import FAMILIES
from gspo_mm.types import EncodedImage, TrainSequence
from tools.check_parity import positions_of

TEXTS = ([*range(5, 18)], [*range(70, 81)], [*range(90, 105)])
ANSWERS = ([31, 32, 33], [41], [51, 52, 53, 54, 55, 56], [61, 62])


@dataclass
class Pictures:
    """Random pixels for images whose width and height are those of their grid."""

    model: Any

    def grid(self, image: EncodedImage) -> torch.Tensor:
        family = FAMILIES[self.model.config.model_type].family
        return torch.tensor([family.grid_of(self.model.config, image.height, image.width)])

    def pixels(self, image: EncodedImage) -> tuple[torch.Tensor, torch.Tensor]:
        generator, grid = torch.Generator().manual_seed(image.data[0]), self.grid(image)
        dim = FAMILIES[self.model.config.model_type].family.patch_dim(self.model.config)
        return torch.randn(int(grid.prod()), dim, generator=generator), grid

    def positions(self, token_ids: torch.Tensor, image_grid_thw: torch.Tensor | None) -> torch.Tensor:
        return positions_of(self.model, token_ids.tolist(), image_grid_thw)


def image(number: int) -> EncodedImage:
    return EncodedImage(data=bytes([number]), key=f"image {number}", width=number + 1, height=2)


def groups(model: Any) -> list[TrainSequence]:
    """Three prompts, of which the first shows two images and the second one of them again, with one to four answers."""
    family, pictures = FAMILIES[model.config.model_type].family, Pictures(model)
    token = family.image_token_id(model.config)
    shown = [(image(1), image(2)), (image(2),), ()] if token is not None else [()] * 3
    sequences: list[TrainSequence] = []
    for number, (text, images) in enumerate(zip(TEXTS, shown, strict=True)):
        prompt = [*text]
        for each in images:
            (count,) = family.tokens_per_image(model.config, pictures.grid(each))
            prompt = [*prompt, *[token] * count, *text[:2]]
        for answer in ANSWERS[number:]:
            ids = np.array(prompt + answer, np.int32)
            sequences.append(
                TrainSequence(
                    name=f"{number}: {answer}",
                    token_ids=ids,
                    trained=np.arange(len(ids)) >= len(prompt),
                    images=images,
                )
            )
    return sequences
