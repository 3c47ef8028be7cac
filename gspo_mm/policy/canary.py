"""The blind-run canary: does the answer's log-prob depend on the image at all?

A model whose vision tower was not loaded, or whose image features are not put in, still trains with a healthy
loss. Log-probs of an answer with its image and with a grey image of the same size tell in a second.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

import torch
from PIL import Image

from gspo_mm.batch import Pixels, answered, pack
from gspo_mm.data.pictures import png_of
from gspo_mm.types import BlindModelError, EncodedImage, EncodedPrompt, MicroBatch, TrainSequence

if TYPE_CHECKING:
    from gspo_mm.policy.engine import Policy

SMALLEST_DIFFERENCE = 1e-6  # nats; an image that is seen moves log-probs by far more


class AnswerProcessor(Pixels, Protocol):
    """What the canary needs of `data.Processor`."""

    def encode_response(self, text: str) -> Iterable[int]: ...


def check_sight(policy: Policy, processor: AnswerProcessor, prompts: Iterable[EncodedPrompt]) -> float:
    """Mean absolute difference, in nats per token, that blanking the images makes to the reference answers.

    Prompts without images are skipped; with none left the answer is 0. Raises BlindModelError when no token's
    log-prob moves by 1e-6.
    """
    seen = [_answered(p, processor) for p in prompts if p.prompt.images]
    if not seen:
        return 0.0
    blank = [dataclasses.replace(s, images=tuple(map(blank_image, s.images))) for s in seen]
    difference_R = _logprobs(policy, [pack([s], processor) for s in seen]) - _logprobs(
        policy, [pack([s], processor) for s in blank]
    )
    if float(difference_R.abs().max()) < SMALLEST_DIFFERENCE:
        raise BlindModelError(
            f"the model does not see: blanking the images of {len(seen)} prompts (first {seen[0].name}) changes no "
            f"answer's log-prob by {SMALLEST_DIFFERENCE:g}; check that model.path holds the vision tower's weights"
        )
    return float(difference_R.abs().mean())


def blank_image(image: EncodedImage) -> EncodedImage:
    """A mid-grey image of the same size."""
    data = png_of(Image.new("RGB", (image.width, image.height), (128, 128, 128)))
    return EncodedImage(data=data, key=EncodedImage.key_of(data), width=image.width, height=image.height)


def _answered(encoded: EncodedPrompt, processor: AnswerProcessor) -> TrainSequence:
    prompt = encoded.prompt
    answer = prompt.response if prompt.response is not None else str(prompt.answer)
    return answered(encoded, processor.encode_response(answer))


def _logprobs(policy: Policy, batches: list[MicroBatch]) -> torch.Tensor:
    return torch.cat(policy.logprobs(batches)).cpu()
