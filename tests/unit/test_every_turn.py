"""Samples whose messages hold turns of the assistant: supervised training trains on every one of them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoProcessor

from gspo_mm.config import DataConfig
from gspo_mm.data.pictures import decode_image
from gspo_mm.data.processor import Processor
from gspo_mm.sft import supervised
from gspo_mm.types import DataError, Prompt
from tests.unit.test_conversations import BY_WHAT_FOLLOWS
from tests.unit.test_environment import asked, encoded

# ChatML that says where the assistant speaks, which gives transformers' own mask
TEMPLATE = (
    "{%- for m in messages -%}{%- set text -%}{%- if m.content is string -%}{{- m.content -}}{%- else -%}"
    "{%- for p in m.content -%}{%- if p.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- else -%}{{- p.text -}}{%- endif -%}{%- endfor -%}{%- endif -%}{%- endset -%}"
    "{{- '<|im_start|>' + m.role + '\n' -}}{%- if m.role == 'assistant' -%}"
    "{%- generation -%}{{- text -}}{%- if m.tool_calls -%}{{- '\n' if text -}}{{- m.tool_calls | tojson -}}{%- endif -%}"
    "{{- '<|im_end|>' -}}{%- endgeneration -%}{{- '\n' -}}{%- else -%}{{- text + '<|im_end|>\n' -}}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
TEMPLATES = {
    "as it is": TEMPLATE,
    # an empty thought before earlier turns, and no white space around them: as GLM-4.5V's
    "after a thought": TEMPLATE.replace(
        "{%- generation", "{{- '<think></think>\n' if not loop.last -}}{%- generation"
    ).replace("{{- text -}}", "{{- text | trim -}}"),
}


def processor_of(model: Path, folder: Path, template: str) -> Processor:
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").write_text(template)
    return Processor(str(folder), DataConfig(train=["x"]))


def shown(text: str, *sizes: tuple[int, int]) -> dict[str, Any]:
    return {
        "role": "user",
        "content": [*({"type": "image", "size": size} for size in sizes), {"type": "text", "text": text}],
    }


def said(text: str, **others: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **others}


CALLS = [{"type": "function", "function": {"name": "look", "arguments": {"at": [1, 2]}}}]
CHATS = {
    "two turns": [shown("Which digit is this?", (64, 32)), said("The answer is 7."), shown("and this?", (32, 96))],
    "four turns": [
        {"role": "system", "content": "Answer with a number."},
        shown("Which digit is this?", (64, 64), (32, 32)),
        said(" 7 \n"),
        shown("Read"),
        {"role": "assistant", "content": [{"type": "text", "text": "<answer>"}, {"type": "text", "text": "8</answer>"}]},
        shown("Look", (96, 32)),
        said("", tool_calls=CALLS),
        {"role": "tool", "content": [{"type": "image", "size": (40, 40)}]},
    ],
    "the assistant begins": [said("What is in the image?"), shown("Look", (64, 64))],
}  # fmt: skip


def prompt_of(chat: list[dict[str, Any]]) -> Prompt:
    sizes = [
        part["size"]
        for m in chat
        if isinstance(m["content"], list)
        for part in m["content"]
        if "size" in part
    ]
    images = tuple(encoded(Image.effect_noise(size, 60).convert("RGB")) for size in sizes)
    messages = json.loads(json.dumps(chat))
    return replace(asked(images), messages=tuple(messages), response="The first.")


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS)
def test_tokens_and_mask_are_those_of_transformers(
    template: str, chat: str, tiny_model: Path, tmp_path: Path
) -> None:
    processor = processor_of(tiny_model, tmp_path / "hf", TEMPLATES[template])
    prompt = prompt_of(CHATS[chat])
    (ours,) = supervised([processor.encode(prompt)], processor, None)
    pictures = iter([decode_image(image.data) for image in prompt.images])
    whole = [
        {
            **m,
            "content": [
                {"type": "image", "image": next(pictures)} if "size" in p else p for p in m["content"]
            ],
        }
        if isinstance(m["content"], list)
        else m
        for m in [*CHATS[chat], said("The first.")]
    ]
    theirs = AutoProcessor.from_pretrained(tmp_path / "hf").apply_chat_template(
        whole, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = theirs["input_ids"][0], theirs["assistant_masks"][0]
    assert ours.token_ids.tolist() == ids[: len(ours.token_ids)]
    assert ours.trained.tolist() == [bool(said) for said in mask[: len(ours.token_ids)]]
    assert not any(mask[len(ours.token_ids) :])
    assert ours.images == prompt.images


def test_a_turn_may_end_with_what_begins_the_next_message(tiny_model: Path, tmp_path: Path) -> None:
    """As GLM-4.5V's, whose end tokens are those of the user's and of a tool's messages."""
    processor_of(tiny_model, tmp_path / "hf", BY_WHAT_FOLLOWS)
    file = tmp_path / "hf" / "generation_config.json"
    name = AutoProcessor.from_pretrained(tmp_path / "hf").tokenizer.convert_tokens_to_ids
    file.write_text(json.dumps({"eos_token_id": name(["<|im_end|>", "<|im_start|>", "<|endoftext|>"])}))
    processor = Processor(str(tmp_path / "hf"), DataConfig(train=["x"]))
    chat = [
        shown("?"),
        said("Look"),
        {"role": "tool", "content": "a 7"},
        said("It is 7."),
        shown("and this?"),
    ]
    parts = [
        m if isinstance(m["content"], list) else m | {"content": [{"type": "text", "text": m["content"]}]}
        for m in chat
    ]
    prompt = processor.encode(prompt_of(parts))
    turns = [processor._tokenizer.decode(prompt.token_ids[place]) for place in processor.said(prompt)]
    assert turns == ["Look<|endoftext|>", "It is 7.<|im_start|>"]


def test_responses_alone_are_trained_where_the_config_says_so(tiny_model: Path) -> None:
    processor = Processor(str(tiny_model), DataConfig(train=["x"]))
    prompt = processor.encode(prompt_of(CHATS["two turns"]))
    (ours,) = supervised([prompt], processor, None, every_turn=False)
    assert ours.token_ids[ours.trained].tolist() == processor.encode_response("The first.")
    (every,) = supervised([prompt], processor, None)
    assert every.token_ids[every.trained].tolist() == [
        *processor.encode_response("The answer is 7."),
        *processor.encode_response("The first."),
    ]


FORGETS = TEMPLATE.replace("{{- text -}}", "{{- text.split('</think>')[-1] -}}")
OTHER_END = TEMPLATE.replace(
    "{{- '<|im_end|>' -}}{%- endgen", "{{- '<|im_end|>' if loop.last else '<|box_end|>' -}}{%- endgen"
)
JOINS = TEMPLATE.replace("+ '\n' -}}{%- if", "+ '\nWh' -}}{%- if")


@pytest.mark.parametrize(
    ("template", "turn", "why"),
    [
        (FORGETS, said("<think>a loop</think>It is 8."), "the chat template changes it where others follow"),
        (
            TEMPLATE,
            said("It is 8.", reasoning_content="a loop"),
            "beside its content it has: reasoning_content",
        ),
        (
            TEMPLATE,
            {"role": "assistant", "content": [{"type": "image", "size": (32, 32)}]},
            "it shows an image",
        ),
        (OTHER_END, said("It is 8."), "what ends it in the chat template stops no answer"),
        (JOINS, said("ich digit?"), "it begins within a token"),
    ],
    ids=["forgotten", "beside", "image", "end", "joined"],
)
def test_a_turn_that_cannot_be_trained_on_is_refused(
    tiny_model: Path, tmp_path: Path, template: str, turn: dict[str, Any], why: str
) -> None:
    processor = processor_of(tiny_model, tmp_path / "hf", template)
    prompt = processor.encode(prompt_of([shown("?", (64, 32)), turn, shown("and this?")]))
    with pytest.raises(
        DataError, match=rf"a\.tar/1: the assistant's message 2 .*{why}.*set sft.every_turn=false"
    ):
        supervised([prompt], processor, None)
    assert supervised([prompt], processor, None, every_turn=False)
