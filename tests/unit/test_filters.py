"""Sound prompts that a run does not want are left out by size, shape, difficulty, or because they are held out."""

import dataclasses
from typing import Any

import pytest

from gspo_mm.config import CurriculumConfig, DataConfig
from gspo_mm.data.faults import BadSample, LeftOut
from gspo_mm.data.filters import Filter, fingerprint
from gspo_mm.types import EncodedImage, Prompt


def prompt(width: int = 64, height: int = 64, key: str = "k", text: str = "?", **meta: Any) -> Prompt:
    image = EncodedImage(data=b"", key=f"{width}x{height}", width=width, height=height)
    messages = ({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]},)
    return Prompt(key=key, messages=messages, images=(image,), answer=1, task="t", meta=meta)


def filter_of(*, training: bool = True, **settings: Any) -> Filter:
    return Filter(DataConfig(train=["x"], **settings), training=training)


@pytest.mark.parametrize(
    ("settings", "size", "reason"),
    [
        ({}, (64, 64), None),
        ({"min_image_pixels": 4097}, (64, 64), "image size"),
        ({"min_image_pixels": 4096, "max_image_pixels": 4096}, (64, 64), None),
        ({"max_image_pixels": 4095}, (64, 64), "image size"),
        ({}, (200, 1), None),
        ({}, (201, 1), "aspect ratio"),
        ({}, (1, 201), "aspect ratio"),
        ({"max_aspect_ratio": 2.0}, (129, 64), "aspect ratio"),
    ],
)
def test_images_outside_the_limits_are_left_out(
    settings: dict[str, Any], size: tuple[int, int], reason: str | None
) -> None:
    if reason is None:
        filter_of(**settings).check(prompt(*size), 0)
        return
    with pytest.raises(LeftOut) as caught:
        filter_of(**settings).check(prompt(*size), 0)
    assert caught.value.reason == reason


CURRICULUM = CurriculumConfig(key="level", start=1, end=5, samples=100)


@pytest.mark.parametrize(
    ("level", "read", "passes"),
    [(1, 0, True), (1.01, 0, False), (3, 49, False), (3, 50, True), (5, 100, True), (6, 10**9, False)],
)
def test_the_curriculum_lets_harder_prompts_in_as_samples_are_read(
    level: float, read: int, passes: bool
) -> None:
    it = filter_of(curriculum=CURRICULUM)
    if passes:
        it.check(prompt(level=level), read)
    else:
        with pytest.raises(LeftOut, match="too difficult"):
            it.check(prompt(level=level), read)


@pytest.mark.parametrize("level", [None, "3", True, [1], float("nan"), 10**400])
def test_a_difficulty_that_is_no_number_is_a_bad_sample(level: Any) -> None:
    with pytest.raises(BadSample):
        filter_of(curriculum=CURRICULUM).check(prompt(level=level), 0)


def test_validation_has_no_curriculum() -> None:
    filter_of(training=False, curriculum=CURRICULUM).check(prompt(), 0)


def test_a_held_out_prompt_is_known_by_what_the_model_sees() -> None:
    it = filter_of()
    it.hold_out([prompt(key="validation/0")])
    with pytest.raises(BadSample, match="held out"):
        it.check(prompt(key="train/9", other=1), 0)
    others = [{"images": ()}, {"pages": prompt().images}]
    for other in (prompt(text="??"), prompt(width=65), *(dataclasses.replace(prompt(), **o) for o in others)):
        it.check(other, 0)
        assert fingerprint(other) != fingerprint(prompt())
