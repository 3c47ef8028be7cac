"""A raw sample becomes a typed prompt, or a reason to count it by; nothing in it is executed."""

import io
import json
import pickle
import struct
import zlib
from typing import Any

import pytest
from PIL import Image

from gspo_mm.data.samples import BadSample, to_prompt
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
