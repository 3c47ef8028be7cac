"""The tiny folder is one that transformers loads, in the layout that published checkpoints have."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.conftest import run_tool


def test_transformers_loads_model_and_processor(tiny_model: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(tiny_model)
    assert type(model).__name__ == "Qwen3VLMoeForConditionalGeneration"
    assert 1_000_000 < sum(p.numel() for p in model.parameters()) < 1_500_000
    assert type(AutoProcessor.from_pretrained(tiny_model)).__name__ == "Qwen3VLProcessor"


def test_experts_are_stored_in_the_published_layout(tiny_model: Path) -> None:
    text = json.loads((tiny_model / "config.json").read_text())["text_config"]
    hidden, inner = text["hidden_size"], text["moe_intermediate_size"]
    weights = load_file(tiny_model / "model.safetensors")
    layer = "model.language_model.layers.0.mlp.experts"
    assert weights[f"{layer}.gate_up_proj"].shape == (8, hidden, 2 * inner)
    assert weights[f"{layer}.down_proj"].shape == (8, inner, hidden)


def test_three_deepstack_levels_as_sglang_expects(tiny_model: Path) -> None:
    vision = json.loads((tiny_model / "config.json").read_text())["vision_config"]
    assert len(vision["deepstack_visual_indexes"]) == 3


def test_digits_and_answer_tags_are_one_token_each(tiny_model: Path) -> None:
    tokenizer = AutoProcessor.from_pretrained(tiny_model).tokenizer
    assert len(tokenizer("<answer>37</answer>", add_special_tokens=False)["input_ids"]) == 4


def test_with_tools_a_call_is_short(tmp_path: Path) -> None:
    run_tool("make_tiny_model.py", tmp_path / "m", "--tools")
    tokenizer = AutoProcessor.from_pretrained(tmp_path / "m").tokenizer
    call = '<tool_call>{"name":"zoom_in","arguments":{"box":[125,0,250,125]}}</tool_call>'
    ids = tokenizer(call, add_special_tokens=False)["input_ids"]
    assert len(ids) < 30
    assert tokenizer.decode(ids, skip_special_tokens=True) == call


def test_the_seed_decides_the_weights(tiny_model: Path, tmp_path: Path) -> None:
    run_tool("make_tiny_model.py", tmp_path / "same", "--seed", 0, forked=False)
    run_tool("make_tiny_model.py", tmp_path / "other", "--seed", 1)
    base, same, other = (
        load_file(p / "model.safetensors") for p in (tiny_model, tmp_path / "same", tmp_path / "other")
    )
    assert all(torch.equal(base[name], same[name]) for name in base)
    assert any(not torch.equal(base[name], other[name]) for name in base)


def test_a_dense_model_can_be_made(tmp_path: Path) -> None:
    run_tool("make_tiny_model.py", tmp_path / "dense", "--family", "qwen3_vl")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "dense")
    assert type(model).__name__ == "Qwen3VLForConditionalGeneration"


def test_an_existing_folder_is_not_replaced_unless_forced(tiny_model: Path) -> None:
    with pytest.raises(Exception, match="non-zero exit status"):
        run_tool("make_tiny_model.py", tiny_model)
