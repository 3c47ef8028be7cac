"""A raw sample becomes a typed prompt, or a reason to count it by; nothing in it is executed."""

import io
import json
import pickle
import struct
import zlib
from typing import Any

import pytest
from PIL import Image

from gspo_mm.data.faults import BadSample
from gspo_mm.data.samples import to_prompt
from gspo_mm.data.shards import FAULT


def png(width: int = 8, height: int = 6) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, "PNG")
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG that claims a size; its pixels are never there."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + checksum + struct.pack(">I", 9) + b"IDAT"


def raw(record: Any = None, **members: bytes) -> dict[str, Any]:
    if record is None:
        record = good()
    data = record if isinstance(record, bytes) else json.dumps(record).encode()
    return {"__key__": "7", "__url__": "/x/a.tar", "json": data, **(members or {"png": png()})}


def good(**changes: Any) -> dict[str, Any]:
    content = [{"type": "image"}, {"type": "text", "text": "Which?"}]
    return {"messages": [{"role": "user", "content": content}], "answer": 3, "task": "digit"} | changes


def test_a_good_sample_is_typed() -> None:
    prompt = to_prompt(raw(good(response="<answer>3</answer>", meta={"a": 1})))
    assert prompt.key == "a.tar/7"
    assert prompt.answer == 3
    assert prompt.task == "digit"
    assert prompt.response == "<answer>3</answer>"
    assert prompt.meta == {"a": 1}
    (image,) = prompt.images
    assert (image.width, image.height, image.data) == (8, 6, png())


def test_several_images_keep_their_numbers_order() -> None:
    content = [{"type": "image"}] * 11
    members = {f"{i}.png": png(width=8 + i) for i in range(11)}
    prompt = to_prompt(raw(good(messages=[{"role": "user", "content": content}]), **members))
    assert [image.width for image in prompt.images] == list(range(8, 19))


def test_a_rotated_photo_has_its_upright_size() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6)).save(buffer, "JPEG", exif=exif)
    (image,) = to_prompt(raw(jpg=buffer.getvalue())).images
    assert (image.width, image.height) == (6, 8)


def shown(record: dict[str, Any] | None = None, **members: int) -> list[int]:
    """Widths of the images in their order, for a sample whose members are so wide, written in this order."""
    content = [{"type": "image"}] * len(members)
    record = good(messages=[{"role": "user", "content": content}]) | (record or {})
    prompt = to_prompt(raw(record, **{name: png(width) for name, width in members.items()}))
    return [image.width for image in prompt.images]


@pytest.mark.parametrize(
    "names",
    [
        [f"{n}.png" for n in range(12)],
        [f"{n:02d}.png" for n in range(12)],
        [f"frame{n}.png" for n in range(12)],
        [f"page.{n}.png" for n in range(12)],
        ["3.jpg", "5.png", "12.webp"],
        ["before.png"],
        ["png"],
    ],
)
@pytest.mark.parametrize("turn", [1, -1])
def test_numbered_images_keep_their_numbers_order_however_the_archive_is_sorted(
    names: list[str], turn: int
) -> None:
    members = {name: 8 + place for place, name in enumerate(names)}
    assert shown(**dict(list(members.items())[::turn])) == list(members.values())
    assert shown(**dict(sorted(members.items()))) == list(members.values())


@pytest.mark.parametrize(
    "names",
    [
        ["before.png", "after.png"],
        ["png", "1.png"],
        ["jpg", "png"],
        ["0.png", "0.jpg"],
        ["1.png", "01.png"],
        ["frame0.png", "crop1.png"],
        ["0.png", "1.png", "mask.png"],
    ],
)
def test_images_without_an_order_are_refused_unless_the_json_gives_one(names: list[str]) -> None:
    members = {name: 8 + place for place, name in enumerate(names)}
    with pytest.raises(BadSample, match="have no order; number them") as caught:
        shown(**members)
    assert caught.value.reason == "image order"
    for order in (names, names[::-1], [f"7.{name}" for name in names], [f"some/7.{name}" for name in names]):
        wanted = [members[name.rpartition("7.")[2]] for name in order]
        assert shown({"images": order}, **members) == wanted


@pytest.mark.parametrize("names", [["before.png", "after.png"], ["1.png", "0.png"]])
def test_image_parts_that_name_their_members_give_the_order(names: list[str]) -> None:
    members = {name: 8 + place for place, name in enumerate(names)}
    for order in (names, names[::-1], [f"x/7.{name}" for name in names]):
        content = [{"type": "image", "image": name} for name in order]
        wanted = [members[name.rpartition("7.")[2]] for name in order]
        assert shown({"messages": [{"role": "user", "content": content}]}, **members) == wanted


def test_a_placeholder_in_the_text_of_a_shard_is_refused() -> None:
    content = [{"type": "image"}, {"type": "text", "text": "<image>Which?"}]
    with pytest.raises(BadSample, match="a text says <image>, which stays text"):
        to_prompt(raw(good(messages=[{"role": "user", "content": content}])))


@pytest.mark.parametrize("listed", [["0.png"], ["0.png", "0.png"], ["0.png", "2.png"], "0.png", [0, 1], []])
def test_images_that_the_json_lists_are_the_members(listed: Any) -> None:
    with pytest.raises(BadSample, match=r"but the members are 0\.png, 1\.png") as caught:
        shown({"images": listed}, **{"0.png": 8, "1.png": 9})
    assert caught.value.reason == "image order"


PAGES = {"0.png": 8, "b.png": 9, "a.png": 10}


def test_members_that_the_json_lists_as_pages_are_in_no_message() -> None:
    members = {name: png(width) for name, width in PAGES.items()}
    prompt = to_prompt(raw(good(pages=["b.png", "7.a.png"]), **members))
    assert [image.width for image in prompt.images] == [8]
    assert [page.width for page in prompt.pages] == [9, 10]
    assert prompt.pictures == prompt.images + prompt.pages
    with pytest.raises(BadSample, match="1 image parts in the messages but 2 images") as caught:
        to_prompt(raw(good(pages=["b.png"], images=["0.png", "a.png"]), **members))
    assert caught.value.reason == "image count"


@pytest.mark.parametrize("listed", [["c.png"], ["b.png", "b.png"], "b.png", [1]])
def test_pages_that_are_no_members_are_refused(listed: Any) -> None:
    members = {name: png(width) for name, width in PAGES.items()}
    with pytest.raises(
        BadSample, match=r"pages in the json is .*, but the members are 0\.png, b\.png, a"
    ) as caught:
        to_prompt(raw(good(pages=listed), **members))
    assert caught.value.reason == "image order"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (["user", "assistant"], "answer in the prompt"),
        (["system", "user", "assistant"], "answer in the prompt"),
        (["user", "tool", "assistant"], "answer in the prompt"),
        (["assistant"], "answer in the prompt"),
        (["user", "system"], "no question"),
        (["system"], "no question"),
        (["tool"], "no question"),
    ],
)
def test_messages_end_with_a_question(messages: list[str], reason: str) -> None:
    said = [{"role": role, "content": [{"type": "image"}] * (not n)} for n, role in enumerate(messages)]
    with pytest.raises(BadSample) as caught:
        to_prompt(raw(good(messages=said)))
    assert caught.value.reason == reason


def test_a_question_after_an_answer_is_a_question() -> None:
    said = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "a cat"}]
    assert to_prompt(raw(good(messages=[*said, {"role": "user", "content": "Why?"}]))).messages[1] == said[1]


def test_an_empty_question_is_none() -> None:
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " "}]
    with pytest.raises(BadSample, match="the messages are empty"):
        to_prompt(raw(good(messages=said), txt=b""))


@pytest.mark.parametrize(
    ("sample", "detail"),
    [
        (raw(png=png(), mp4=b"x"), "mp4 looks like video, which is not read"),
        (raw(png=png(), **{"0.wav": b"x"}), "0.wav looks like sound, which is not read"),
        (raw(png=png(), heic=b"x"), "heic looks like image, which is not read; images are png, jpg"),
        (raw(good(videos=["clip.mp4"])), r"key videos\[0\] looks like video"),
        (raw(good(image_path="a.png")), "key image_path looks like image"),
        (raw(good(extra={"source": {"audio": "x.flac"}})), "key extra.source.audio looks like sound"),
        (
            raw(good(messages=[{"role": "user", "content": [{"type": "image"}], "videos": ["a"]}])),
            "of a message looks like video",
        ),
    ],
)
def test_media_that_the_model_would_not_be_shown_refuse_their_sample(
    sample: dict[str, Any], detail: str
) -> None:
    with pytest.raises(BadSample, match=detail) as caught:
        to_prompt(sample)
    assert caught.value.reason == "unused media"


def test_members_and_keys_that_nothing_reads_are_reported() -> None:
    unused: list[str] = []
    sample = raw(good(difficulty=3, note=None, meta={"image_path": "a.png"}), png=png(), txt=b"x", cls=b"3")
    to_prompt(sample, unused.append)
    assert sorted(unused) == [".cls", ".txt", "key difficulty"]


@pytest.mark.parametrize("name", ["a.b", "photo.2024-01-02.x"])
def test_a_dot_in_a_name_is_called_so(name: str) -> None:
    key, _, rest = name.partition(".")
    sample = {"__key__": key, "__url__": "a.tar", f"{rest}.png": png(), f"{rest}.json": b"{}"}
    with pytest.raises(
        BadSample, match=f"first dot of {name} is .* rename {name}.json .* {name.replace('.', '-')}.json"
    ):
        to_prompt(sample)


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (raw(b"{"), "wrong json"),
        (raw(b"[" * 100_000), "wrong json"),
        (raw(b"\xff\xfe"), "wrong json"),
        (raw([1]), "wrong json"),
        (raw({"messages": [], "answer": 1}), "wrong json"),
        (raw(good(messages=[])), "wrong json"),
        (raw(good(messages=[{"role": "root", "content": "x"}])), "wrong json"),
        (raw(good(messages=[{"role": "user", "content": [{"type": "video"}]}])), "wrong json"),
        (raw(good(messages=[{"role": "user", "content": [{"type": "text"}]}])), "wrong json"),
        (raw(good(task="")), "wrong json"),
        (raw(good(response=3)), "wrong json"),
        ({"__key__": "7", "__url__": "a.tar", "png": png()}, "no json"),
        (raw(txt=b"no image"), "image count"),
        (raw(**{"0.png": png(), "1.png": png()}), "image count"),
        (raw(png=b""), "corrupt image"),
        (raw(png=b"not a picture"), "corrupt image"),
        (raw(png=png_header(20_000, 20_000)), "image too large"),
        (
            raw(png=png_header(9_000, 8_000)),
            "image too large",
        ),  # below the limit at which Pillow itself refuses
        ({"__key__": "7", "__url__": "a.tar", FAULT: "cut off"}, "damaged shard"),
    ],
)
def test_an_unusable_sample_is_refused_with_its_reason(sample: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadSample) as caught:
        to_prompt(sample)
    assert caught.value.reason == reason


def test_a_pickle_in_a_sample_is_not_loaded(tmp_path: Any) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return open, (str(tmp_path / "exploded"), "w")

    to_prompt(raw(png=png(), pyd=pickle.dumps(Bomb()), pkl=pickle.dumps(Bomb())))
    assert not (tmp_path / "exploded").exists()
