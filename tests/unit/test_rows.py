"""Rows in the formats of the field become samples that training can use, and nothing else does."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gspo_mm.data.faults import BadSample
from gspo_mm.data.processor import decode_image
from gspo_mm.data.samples import to_prompt
from gspo_mm.types import Prompt
from tools.shard_rows.rows import Columns, Row, sample_of


def picture(color: int = 0, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10), (color, 0, 0)).save(buffer, format=form)
    return buffer.getvalue()


def with_pictures(folder: Path) -> Path:
    (folder / "pictures").mkdir()
    for color in range(3):
        (folder / "pictures" / f"{color}.png").write_bytes(picture(color))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return with_pictures(tmp_path)


def prompt_of(row: Row, folder: Path, **columns: Any) -> Prompt:
    return to_prompt({**sample_of(row, "k", Columns(**columns), folder=folder, task="t"), "__url__": "u"})


def contents(prompt: Prompt) -> list[Any]:
    """The messages, with images as "#"."""
    return [
        content
        if isinstance(content := message["content"], str)
        else ["#" if part["type"] == "image" else part["text"] for part in content]
        for message in prompt.messages
    ]


def test_a_phone_s_jpeg_with_a_second_picture_behind_it_is_a_jpeg(folder: Path) -> None:
    two = io.BytesIO()
    Image.new("RGB", (8, 6), "red").save(two, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 6))])
    row = {"question": "?", "answer": "", "images": [{"bytes": two.getvalue()}]}
    sample = sample_of(row, "k", Columns(), folder=folder, task="t")
    assert sample["0.jpg"] == two.getvalue()
    (image,) = to_prompt({**sample, "__url__": ""}).images
    assert (image.width, image.height) == (8, 6)
    assert decode_image(image.data).getpixel((4, 3))[0] > 200, "the first of both"


def test_pictures_keep_their_bytes_order_and_format(folder: Path) -> None:
    jpeg = picture(200, "JPEG")
    row = {
        "question": "?",
        "answer": "",
        "images": ["pictures/2.png", {"bytes": jpeg, "path": "x"}, "pictures/0.png"],
    }
    sample = sample_of(row, "k", Columns(), folder=folder, task="t")
    assert [name for name in sample if name[0].isdigit()] == ["0.png", "1.jpg", "2.png"]
    assert [sample["0.png"], sample["1.jpg"], sample["2.png"]] == [picture(2), jpeg, picture(0)]


def test_an_answer_at_the_end_of_the_messages_is_the_reference(folder: Path) -> None:
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "<answer>3</answer>"}]
    prompt = prompt_of({"messages": messages, "solution": "3"}, folder)
    assert contents(prompt) == ["?"]
    assert prompt.response == "<answer>3</answer>"


def test_columns_can_be_named_and_kept(folder: Path) -> None:
    row = {"q": "?", "gold": {"value": 7}, "kind": "sums", "level": 3, "answer": "not this"}
    prompt = prompt_of(
        row, folder, prompt="q", answer="gold.value", task="kind", meta=("level",), system="Be brief."
    )
    assert (prompt.answer, prompt.task, prompt.meta) == (7, "sums", {"level": 3})
    assert contents(prompt) == ["Be brief.", "?"]


@pytest.mark.parametrize(
    ("change", "reason", "detail"),
    [
        (
            {"question": None},
            "no prompt",
            "any of messages, conversations, prompt, .*, instruction is missing or null",
        ),
        (
            {"answer": None},
            "no answer",
            "any of answer, solution, .* is missing or null; the row has question",
        ),
        ({"answer": float("nan")}, "wrong value", "nan is nothing that JSON can hold"),
        ({"images": ["pictures/9.png"]}, "no image", "pictures/9.png: No such file"),
        (
            {"images": ["https://example.org/a.png"]},
            "no image",
            "web address, which is not fetched; download it",
        ),
        ({"images": [3]}, "no image", "no path, no bytes and no data: URL"),
        ({"images": ["data:image/png;base64,%%%"]}, "corrupt image", "data: URL"),
        ({"images": [{"bytes": b"", "path": None}]}, "no image", "no path"),
        (
            {"images": [{"bytes": b"GIF89a not", "path": None}]},
            "corrupt image",
            "its header is of none of PNG, JPEG",
        ),
        (
            {"images": [{"bytes": picture()[:40], "path": None}]},
            "corrupt image",
            "its header is of none of PNG, JPEG",
        ),
        ({"question": "<image> and <image>", "images": ["pictures/0.png"]}, "image count", "2 image parts"),
        ({"question": "<image>"}, "image count", "1 image parts in the messages but 0 images"),
        ({"question": [{"role": "robot", "content": "?"}]}, "wrong json", "a message needs a role"),
        (
            {"question": [{"role": "user", "content": [{"type": "video"}]}]},
            "wrong prompt",
            "part type 'video'",
        ),
        (
            {"videos": ["clip.mp4"]},
            "unused media",
            r"column videos\[0\] looks like video and is not used: video cannot",
        ),
        ({"audios": ["a.wav"]}, "unused media", "looks like sound"),
        (
            {"image_1": "a.png", "image_2": "b.png"},
            "unused media",
            "column image_1 .*: --image image_1,image_2 reads it, --ignore image_1,image_2",
        ),
        ({"image_path": "a.png"}, "unused media", "column image_path looks like image"),
        ({"img": {"bytes": picture(), "path": None}}, "unused media", "column img looks like image"),
        ({"Image": "a"}, "unused media", "column Image looks like image"),
        ({"photo_url": "https://example.org/1"}, "unused media", "column photo_url looks like image"),
        ({"left": "pictures/0.png"}, "unused media", "column left looks like image"),
        ({"scan": picture()}, "unused media", "column scan looks like image"),
        (
            {"attachments": [{"bytes": picture()}]},
            "unused media",
            r"column attachments\[0\] looks like image",
        ),
        ({"extra_info": {"image": "pictures/0.png"}}, "unused media", "--image extra_info.image reads it"),
        ({"input": "data:video/mp4;base64,AAAA"}, "unused media", "looks like video"),
        (
            {"image": "pictures/0.png", "images": ["pictures/1.png"]},
            "unused media",
            "column image looks like image",
        ),
        (
            {"question": [{"role": "user", "content": "?", "images": ["pictures/0.png"]}]},
            "unused media",
            r"column images\[0\]",
        ),
        (
            {"question": [{"role": "user", "content": [{"type": "text", "text": "?", "image": "a.png"}]}]},
            "wrong json",
            "a text part has image beside its text",
        ),
        (
            {
                "question": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "3"}],
                "response": "4",
            },
            "two responses",
            "the last message and a column hold different ones",
        ),
        (
            {
                "question": [{"role": "user", "content": [{"type": "image", "image": "pictures/0.png"}]}],
                "images": ["pictures/1.png"],
            },
            "image order",
            "some images stand in the messages and others in a column",
        ),
        (
            {"question": "Find <ref-object>.", "objects": {"ref": ["a cat"], "bbox": [[1, 2, 3, 4]]}},
            "objects in text",
            "say in which unit your model gives boxes: --box-unit thousand",
        ),
        ({"completion": 4}, "wrong response", "'4' is no text|4 is no text"),
        (
            {"completion": [{"content": "a"}, {"content": "b"}]},
            "wrong response",
            "neither text nor one message",
        ),
        ({"question": ["?"]}, "wrong prompt", "neither text nor a list of messages"),
        ({"question": []}, "wrong prompt", "neither text nor a list of messages"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_with_its_reason(
    change: dict[str, Any], reason: str, detail: str, folder: Path
) -> None:
    row = {"question": "?", "answer": "1"} | change
    with pytest.raises(BadSample, match=detail) as caught:
        sample_of(row, "k", Columns(), folder=folder, task="t")
    assert caught.value.reason == reason


def unused_of(row: Row, folder: Path, **columns: Any) -> list[str]:
    unused: list[str] = []
    sample_of(row, "k", Columns(**columns), folder=folder, task="t", on_unused=unused.append)
    return unused


def test_columns_that_are_not_used_are_reported(folder: Path) -> None:
    row = {
        "question": "?",
        "answer": "1",
        "solution": "one",
        "image_id": 7,
        "image_size": "20x10",
        "num_images": 0,
        "videos": [],
        "audio": None,
        "level": 3,
        "source": "a.b, page 3.png or so",
    }
    assert unused_of(row, folder, meta=("level",)) == [
        "solution",
        "image_id",
        "image_size",
        "num_images",
        "source",
    ]
    assert unused_of(row | {"clip": "a.mp4"}, folder, meta=("level",), ignore=("clip", "solution"))[:1] == [
        "image_id"
    ]


def test_a_column_that_is_ignored_is_not_read(folder: Path) -> None:
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "3"}]
    row = {"messages": messages, "answer": 3, "response": "4", "system": "Be brief."}
    prompt = prompt_of(row, folder, ignore=("response", "system"))
    assert (prompt.response, contents(prompt)) == ("3", ["?"])


def test_a_history_of_another_kind_is_not_used(folder: Path) -> None:
    row = {"question": "?", "answer": 3, "history": ["2024-01-01"], "input": "x", "system": {"name": "linux"}}
    assert unused_of(row, folder) == ["history", "input", "system"]


def test_a_path_beside_a_picture_that_is_read_says_where_it_came_from(folder: Path) -> None:
    row = {"question": "?", "answer": "1", "images": ["pictures/0.png"], "file": "0001.jpg"}
    assert unused_of(row, folder) == ["file"]
    with pytest.raises(BadSample, match="column file looks like image"):
        unused_of(row | {"images": None}, folder)


def test_what_a_message_or_a_part_holds_beside_its_content_is_reported(folder: Path) -> None:
    part = {"type": "image", "image": "pictures/0.png", "max_pixels": 99}
    row = {"prompt": [{"role": "user", "content": [part], "loss": 1.0, "name": "Ann"}], "answer": 1}
    assert unused_of(row, folder) == ["max_pixels of image parts", "loss of messages"]
    assert prompt_of(row, folder).messages[0]["name"] == "Ann", "chat templates read it"


def test_columns_of_images_make_one_list_in_their_order(folder: Path) -> None:
    row = {
        "question": "<image>, then <image>?",
        "answer": 1,
        "b": "pictures/2.png",
        "a": ["pictures/0.png"],
        "c": None,
    }
    prompt = prompt_of(row, folder, images=("b", "c", "a"))
    assert [image.data for image in prompt.images] == [picture(2), picture(0)]
    with pytest.raises(BadSample, match="column c, d is missing or null"):
        prompt_of(row, folder, images=("c", "d"), ignore=("a", "b"))


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"response": "<answer>1</answer>"}, {}),
        ({"completion": "<answer>1</answer>"}, {}),
        ({"completion": [{"role": "assistant", "content": "<answer>1</answer>"}]}, {}),
        ({"gold": "<answer>1</answer>", "response": "no"}, {"response": "gold"}),
    ],
)
def test_a_reference_answer_may_stand_in_a_column(
    row: dict[str, Any], columns: dict[str, str], folder: Path
) -> None:
    assert (
        prompt_of({"question": "?", "answer": "1"} | row, folder, **columns).response == "<answer>1</answer>"
    )


def test_meta_that_a_row_lacks_is_null(folder: Path) -> None:
    row = {"question": "?", "answer": "1", "level": 3, "a.b": 5, "c": {"d": 6}}
    meta = ("level", "other", "a.b", "c.d", "c.e.f")
    wanted = {"level": 3, "other": None, "a.b": 5, "c.d": 6, "c.e.f": None}
    assert prompt_of(row, folder, meta=meta).meta == wanted
