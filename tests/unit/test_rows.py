"""Rows in the formats of the field become samples that training can use, and nothing else does."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gspo_mm.data.processor import decode_image
from gspo_mm.data.rows import Columns, Row, sample_of
from gspo_mm.data.samples import BadSample, to_prompt
from gspo_mm.types import Prompt


def picture(color: int = 0, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10), (color, 0, 0)).save(buffer, format=form)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for color in range(3):
        (tmp_path / "pictures" / f"{color}.png").write_bytes(picture(color))
    return tmp_path


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


FORMATS: dict[str, tuple[dict[str, Any], list[Any], Any, str]] = {
    "TRL, conversation": (
        {
            "prompt": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What is x?"}],
            "image": {"bytes": picture(), "path": None},
            "solution": "3",
        },
        ["Be short.", ["#", "What is x?"]],
        "3",
        "t",
    ),
    "TRL, parts": (
        {
            "prompt": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "text": None},
                        {"type": "text", "text": "and", "image": None},
                        {"type": "image", "text": None},
                    ],
                }
            ],
            "images": [{"bytes": picture(1), "path": "a.png"}, {"bytes": picture(2), "path": "b.png"}],
            "answer": 5,
        },
        [["#", "and", "#"]],
        5,
        "t",
    ),
    "verl, geometry": (
        {
            "data_source": "hiyouga/geometry3k",
            "prompt": [{"role": "user", "content": "<image>Find y. Think first."}],
            "images": [{"bytes": picture(), "path": None}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "2 \\sqrt { 221 }"},
            "extra_info": {"split": "train", "index": 0},
        },
        [["#", "Find y. Think first."]],
        "2 \\sqrt { 221 }",
        "math",
    ),
    "ms-swift": (
        {
            "messages": [{"role": "user", "content": "Is <image> like <image>?"}],
            "images": ["pictures/0.png", "pictures/1.png"],
            "solution": "no",
        },
        [["Is ", "#", " like ", "#", "?"]],
        "no",
        "t",
    ),
    "slime": (
        {"prompt": "How many?", "images": ["pictures/2.png"], "label": "4", "metadata": {"a": 1}},
        [["#", "How many?"]],
        "4",
        "t",
    ),
    "plain text": ({"question": "2 + 2?", "answer": 4, "image": None}, ["2 + 2?"], 4, "t"),
    "data URL": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "image_url",
                            "image_url": {
                                "url": "data:image/png;base64," + base64.b64encode(picture()).decode()
                            },
                        },
                        {"type": "text", "text": "?"},
                    ],
                }
            ],
            "answer": [1, 2],
        },
        [["#", "?"]],
        [1, 2],
        "t",
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_of_the_field_are_read_as_they_are(name: str, folder: Path) -> None:
    row, messages, answer, task = FORMATS[name]
    prompt = prompt_of(row, folder)
    assert contents(prompt) == messages
    assert (prompt.answer, prompt.task) == (answer, task)
    assert len(prompt.images) == json.dumps(messages).count("#")


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
            "any of messages, prompt, problem, question, query is missing or null",
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
        ({"images": [{"bytes": b"GIF89a not", "path": None}]}, "corrupt image", ""),
        ({"images": [{"bytes": picture()[:40], "path": None}]}, "corrupt image", ""),
        ({"question": "<image> and <image>", "images": ["pictures/0.png"]}, "image count", "2 image parts"),
        ({"question": "<image>"}, "image count", "1 image parts in the messages but 0 images"),
        ({"question": [{"role": "robot", "content": "?"}]}, "wrong json", "a message needs a role"),
        (
            {"question": [{"role": "user", "content": [{"type": "video"}]}]},
            "wrong prompt",
            "part type 'video'",
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
