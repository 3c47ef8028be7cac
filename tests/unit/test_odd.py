"""Prompts whose pictures are unlike the others' come first."""

from gspo_mm.data.odd import describe, odd_ones
from gspo_mm.data.pictures import measure
from gspo_mm.types import EncodedImage, Prompt
from tests.pictures import scene, turned, with_alpha
from tests.tars import image_bytes


def image(data: bytes) -> EncodedImage:
    width, height = measure(data)
    return EncodedImage(data=data, key=EncodedImage.key_of(data), width=width, height=height)


def prompt(key: str, *pictures: bytes) -> Prompt:
    return Prompt(key=key, messages=(), images=tuple(map(image, pictures)), answer=None, task="t")


USUAL = [prompt(f"usual {n}", image_bytes(scene())) for n in range(20)]
ODD = [
    prompt("turned", turned("JPEG", 6, "exif")),
    prompt("by xmp", turned("PNG", 8, "xmp")),
    prompt("seen through", image_bytes(scene()), with_alpha("RGBA", "PNG")),
    prompt("a hole", image_bytes(scene().convert("L"), transparency=3)),
    prompt("thin", image_bytes(scene(900, 30))),
    prompt("large", image_bytes(scene(600, 400))),
]


def test_every_oddity_is_found_before_a_usual_picture() -> None:
    mixed = [*USUAL[:10], *ODD, prompt("no picture"), *USUAL[10:]]
    found = [p.key for p in odd_ones(mixed, 8)]
    assert set(found[: len(ODD)]) == {p.key for p in ODD}
    assert found[len(ODD) :] == ["usual 0"]


def test_they_are_no_more_than_asked_for_and_none_without_pictures() -> None:
    assert len(odd_ones([*USUAL, *ODD], 3)) == 3
    assert odd_ones([prompt("text"), prompt("text too")], 3) == []


def test_a_picture_is_described_by_what_sets_it_apart() -> None:
    said = {p.key: describe(p.images[-1]) for p in ODD}
    assert said["turned"] == "JPEG RGB orientation 6, 24x40"
    assert said["by xmp"] == "PNG RGB orientation 8, 24x40"
    assert said["seen through"] == "PNG RGBA, 40x24"
    assert said["a hole"] == "PNG L transparency, 40x24"
