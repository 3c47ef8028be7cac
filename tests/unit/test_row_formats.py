"""Rows in the formats of the field become samples, without a column being named."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_rows import contents, picture, prompt_of, with_pictures

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
