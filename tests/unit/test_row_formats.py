"""Rows in the formats of the field become samples, without a column being named."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from gspo_mm.data.faults import BadSample
from gspo_mm.reward.spec import parse_reward
from tests.unit.test_rows import contents, picture, prompt_of, with_pictures
from tests.unit.test_turn_rewards import in_turns

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


# supervised data without an answer of its own, with the reference answer that it has
SUPERVISED: dict[str, tuple[dict[str, Any], list[Any], str]] = {
    "TRL, conversation": (
        {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is 4."}]},
        ["2 + 2?"],
        "It is 4.",
    ),
    "TRL, completion": (
        {
            "prompt": [{"role": "user", "content": "What is it?"}],
            "completion": [{"role": "assistant", "content": "A cat."}],
            "images": [{"bytes": picture(), "path": None}],
        },
        [["#", "What is it?"]],
        "A cat.",
    ),
    "ms-swift": (
        {
            "system": "Be short.",
            "history": [["1 + 1?", "2"]],
            "query": "<image>And this?",
            "response": "3",
            "images": ["pictures/0.png"],
        },
        ["Be short.", "1 + 1?", "2", ["#", "And this?"]],
        "3",
    ),
    "LLaVA": (
        {
            "id": "1",
            "image": "pictures/1.png",
            "conversations": [
                {"from": "human", "value": "<image>What is it?"},
                {"from": "gpt", "value": "A cat."},
                {"from": "human", "value": "Which color?"},
                {"from": "gpt", "value": "Red."},
            ],
        },
        [["#", "What is it?"], "A cat.", "Which color?"],
        "Red.",
    ),
    "LLaMA-Factory, alpaca": (
        {"instruction": "Translate.", "input": "eins", "output": "one", "system": "", "history": []},
        ["Translate.\neins"],
        "one",
    ),
    "LLaMA-Factory, conversations": (
        {
            "system": "Be short.",
            "images": ["pictures/2.png"],
            "conversations": [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A dog."}],
        },
        ["Be short.", ["#", "What is it?"]],
        "A dog.",
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_of_the_field_are_read_as_they_are(name: str, tmp_path: Path) -> None:
    row, messages, answer, task = FORMATS[name]
    prompt = prompt_of(row, with_pictures(tmp_path))
    assert contents(prompt) == messages
    assert (prompt.answer, prompt.task) == (answer, task)
    assert len(prompt.images) == json.dumps(messages).count("#")


@pytest.mark.parametrize("name", SUPERVISED)
def test_a_reference_answer_is_the_answer_of_rows_without_one(name: str, tmp_path: Path) -> None:
    row, messages, response = SUPERVISED[name]
    prompt = prompt_of(row, with_pictures(tmp_path))
    assert contents(prompt) == messages
    assert (prompt.answer, prompt.response) == (response, response)
    assert prompt_of(row | {"answer": 7}, tmp_path).answer == 7


# of a picture of 20 x 10 pixels
PLACES: list[tuple[dict[str, Any], str, list[Any], str]] = [
    ({"bbox": [[2, 1, 15, 9]]}, "thousand", ["<bbox>"], "[100, 100, 750, 900]"),
    ({"bbox": [[2.4, 1, 15, 9]], "bbox_type": "real"}, "pixels", ["<bbox>"], "[2, 1, 15, 9]"),
    ({"bbox": [[2, 1, 15, 9]]}, "one", ["<bbox>"], "[0.1, 0.1, 0.75, 0.9]"),
    ({"bbox": [[0.1, 0.1, 0.75, 0.9]], "bbox_type": "norm1"}, "thousand", ["<bbox>"], "[100, 100, 750, 900]"),
    ({"bbox": [[0.1, 0.1, 0.75, 0.9]], "bbox_type": "norm1"}, "pixels", ["<bbox>"], "[2, 1, 15, 9]"),
    ({"bbox": [[5, 5]]}, "thousand", ["click(<bbox>)"], "click([250, 500])"),
    ({"bbox": [[5, 5], [0, 0, 20, 10]], "image_id": [0, 0]}, "one", ["<bbox> in <bbox>"],
     "[0.25, 0.5] in [0.0, 0.0, 1.0, 1.0]"),
]  # fmt: skip


@pytest.mark.parametrize(("objects", "unit", "said", "expected"), PLACES)
def test_names_and_boxes_of_ms_swift_are_written_in_the_models_unit(
    objects: dict[str, Any], unit: str, said: list[str], expected: str, tmp_path: Path
) -> None:
    row = {
        "messages": [
            {"role": "user", "content": "<image>Find <ref-object>."},
            {"role": "assistant", "content": said[0]},
        ],
        "images": ["pictures/0.png"],
        "objects": {"ref": ["the cat"], **objects},
    }
    prompt = prompt_of(row, with_pictures(tmp_path), box_unit=unit)
    assert contents(prompt) == [["#", "Find the cat."]]
    assert prompt.response == prompt.answer == expected


def test_an_answer_that_was_a_mark_is_a_box_for_rewards(tmp_path: Path) -> None:
    row = {
        "query": "<image>Where?",
        "response": "<bbox>",
        "images": ["pictures/0.png"],
        "objects": {"bbox": [[2, 1, 15, 9]]},
    }
    prompt = prompt_of(row, with_pictures(tmp_path), box_unit="thousand")
    part = {"name": "box", "type": "box_iou", "args": {"text_unit": "thousand", "answer_unit": "thousand"}}
    function = parse_reward({"name": "r", "parts": [part]}, file="r.yaml")
    answers = [in_turns("[100, 100, 750, 900]"), in_turns("[100, 100, 750, 500]")]
    assert [function.score(prompt, answer).value for answer in answers] == pytest.approx([1.0, 0.5])


@pytest.mark.parametrize(
    ("objects", "detail"),
    [
        ({"ref": [], "bbox": [[1, 2, 3, 4]]}, "more <ref-object> than objects has"),
        ({"ref": ["a", "b"], "bbox": [[1, 2, 3, 4]]}, "objects has 1 more than the texts have <ref-object>"),
        ({"ref": ["a"], "bbox": [[1, 2, 3]]}, "no box of 4 numbers and no point of 2"),
        ({"ref": ["a"], "bbox": [[1, 2, 3, 4]], "image_id": [1]}, "a box is on image 1; the row has 1"),
        (
            {"ref": ["a"], "bbox": [[1, 2, 3, 4]], "bbox_type": "norm1000"},
            "'norm1000' is neither real nor norm1",
        ),
        ({"ref": "a", "bbox": [[1, 2, 3, 4]]}, "ref of objects is 'a', no list"),
        ([1], "no object with ref and bbox"),
    ],
)
def test_objects_that_do_not_fit_their_text_are_refused(objects: Any, detail: str, tmp_path: Path) -> None:
    row = {
        "query": "<image><ref-object>?",
        "response": "<bbox>",
        "images": ["pictures/0.png"],
        "objects": objects,
    }
    with pytest.raises(BadSample, match=detail) as caught:
        prompt_of(row, with_pictures(tmp_path), box_unit="thousand")
    assert caught.value.reason == "wrong objects"
