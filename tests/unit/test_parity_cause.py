"""What the comparison of servers and policy blames, by where the differences are."""

from typing import Any

import pytest

from gspo_mm.data.pictures import measure
from gspo_mm.sync.parity import PLACES, _cause, _gaps, _Sample
from gspo_mm.types import EncodedImage, Prompt
from tests.pictures import ALL

NOISE = 0.03  # nats, of bfloat16
BOUND = 0.1


def sample(name: str, text: float, after: float | None, response: float) -> _Sample:
    images: tuple[EncodedImage, ...] = ()
    if after is not None:
        data = ALL[name] if name in ALL else ALL["PNG RGB"]
        width, height = measure(data)
        images = (EncodedImage(data=data, key="k", width=width, height=height),)
    places = dict(zip(PLACES, (text, after, response), strict=True))
    return _Sample(
        prompt=Prompt(key=name, messages=(), images=images, answer=None, task="t"),
        differences={place: [] if gap is None else [gap] * 16 for place, gap in places.items()},
    )


def twins(*samples: _Sample, text: float = NOISE, response: float = NOISE) -> list[_Sample]:
    """The samples and the same ones without their pictures, as the comparison asks them."""
    return [*samples, *(sample("text", text, None, response) for _ in samples)]


def usual(count: int, **gaps: float) -> list[_Sample]:
    return [
        sample(f"usual {n}", gaps.get("text", NOISE), gaps.get("after", NOISE), gaps.get("response", NOISE))
        for n in range(count)
    ]


def said(samples: list[_Sample], **more: Any) -> str | None:
    return _cause(samples, _gaps(samples), BOUND, more.get("times", 1.0))


def test_rounding_alone_is_nobodys_fault() -> None:
    assert said(twins(*usual(12))) is None


@pytest.mark.parametrize(("after", "response"), [(0.3, 0.3), (NOISE, 0.5), (0.5, NOISE)])
def test_one_picture_is_named_though_the_mean_of_all_is_below_the_bound(
    after: float, response: float
) -> None:
    odd = sample("JPEG turned 6 by exif", NOISE, after, response)
    cause = said(twins(*usual(11), odd)) or ""
    assert "in 1 of 12 samples" in cause
    assert "JPEG turned 6 by exif (JPEG RGB orientation 6, 24x40) by " in cause
    assert "usual" not in cause


def test_one_token_with_another_expert_is_no_other_picture() -> None:
    flipped = sample("usual", NOISE, NOISE, NOISE)
    flipped.differences["response"][3] = flipped.differences["after an image"][5] = 6.0
    assert said(twins(*usual(11), flipped)) is None
    assert said(twins(flipped)) is None


def test_only_the_worst_of_many_pictures_are_named() -> None:
    odd = [sample(f"odd {n}", NOISE, 0.2 + n / 10, NOISE) for n in range(5)]
    cause = said(twins(*usual(7), *odd)) or ""
    assert "in 5 of 12 samples" in cause
    assert [name for name in ("odd 4", "odd 3", "odd 2", "odd 1", "odd 0") if name in cause] == [
        "odd 4",
        "odd 3",
        "odd 2",
    ]


def test_differences_after_every_picture_accuse_the_vision_path() -> None:
    cause = said(twins(*usual(12, after=0.4, response=0.4))) or ""
    assert "text agrees, what follows an image does not" in cause
    assert "; furthest apart: usual 0 (PNG RGB, 40x24) by 0.4; usual 1" in cause
    assert "extra_args" not in cause


def test_differences_everywhere_accuse_precision_or_model() -> None:
    cause = said(twins(*usual(12, text=0.2, after=0.4, response=0.4), text=0.2, response=0.3)) or ""
    assert "plain text differs already: see that rollout.sglang.extra_args" in cause


def test_differences_in_responses_alone_accuse_cache_or_sampling() -> None:
    cause = said(twins(*usual(12, response=0.5), response=0.5)) or ""
    assert "prompts agree, responses do not" in cause


def test_a_single_sample_is_judged_by_a_wider_bound_when_asked_so() -> None:
    odd = twins(sample("odd", NOISE, 0.15, 0.1))
    assert "odd (PNG RGB, 40x24) by 0.15" in (said(odd) or "")
    assert said(odd, times=2.0) is None
    assert "2 x rollout.sglang.max_logprob_gap=0.1 nats" in (
        said(twins(sample("odd", NOISE, 0.3, 0.1)), times=2.0) or ""
    )
