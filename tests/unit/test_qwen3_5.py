"""Folders of Qwen3.5: experts in any form, layers that are carried along, variants that are refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from gspo_mm.families.folder import read_hf
from gspo_mm.families.qwen3_5 import Qwen35
from gspo_mm.families.table import family_of
from gspo_mm.families.write import copy_template, write_hf
from gspo_mm.hf.headers import HfFolderError
from gspo_mm.types import GspoError
from tests.tiny_vl import save, tiny_hybrid


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_hybrid()


def assert_reads_as(model: Any, folder: Path) -> None:
    found, expected = dict(read_hf(folder)), dict(model.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("layout", ["published", "transformers"])
def test_experts_stacked_or_one_by_one_are_read_and_written_stacked(
    layout: str, model: Any, tmp_path: Path
) -> None:
    folder = save(model, tmp_path / "in", layout=layout)
    assert_reads_as(model, folder)
    out = write_hf(tmp_path / "out", folder, read_hf(folder))
    assert "model.language_model.layers.0.mlp.experts.gate_up_proj" in load_file(out / "model.safetensors")
    assert_reads_as(model, out)
    for name, tensor in AutoModelForImageTextToText.from_pretrained(out).named_parameters():
        assert torch.equal(tensor, dict(model.named_parameters())[name])


@pytest.mark.parametrize("by_template", [False, True], ids=["from the folder", "from a converted folder"])
def test_layers_that_predict_several_tokens_are_carried_along(
    by_template: bool, model: Any, tmp_path: Path
) -> None:
    folder = save(model, tmp_path / "in")
    file = folder / "model.safetensors"
    extra = {"mtp.fc.weight": torch.randn(4, 8), "mtp.norm.weight": torch.randn(3).bfloat16()}
    save_file({**load_file(file), **extra}, file, metadata={"format": "pt"})
    tensors = list(read_hf(folder))
    assert not [name for name, _ in tensors if name.startswith("mtp")]
    source = folder
    if by_template:
        source = tmp_path / "template"
        copy_template(read_hf(folder), source)
    written = load_file(write_hf(tmp_path / "out", source, tensors) / "model.safetensors")
    for name, tensor in extra.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name], tensor)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"attention_bias": True}, r"attention_bias=true is not supported; use false"),
        ({"hidden_act": "gelu"}, r"hidden_act='gelu' is not supported; use 'silu'"),
        ({"num_experts_per_tok": 1}, r"num_experts_per_tok=1 .*use a model with 2 to 8 experts"),
        (
            {"layer_types": ["linear_attention", "sliding_attention", "full_attention", "full_attention"]},
            r"layer_types holds 'sliding_attention'; use linear_attention and full_attention",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_variants_that_are_not_supported_are_refused_by_name(
    text: dict[str, Any], message: str, model: Any, tmp_path: Path
) -> None:
    folder = save(model, tmp_path)
    config = model.config.to_dict()
    config["text_config"] |= text
    type(model.config)(**config).save_pretrained(folder)
    with pytest.raises(HfFolderError, match=message):
        read_hf(folder)


# servers


@pytest.mark.parametrize(
    ("half", "change", "message"),
    [
        ("text", {"full_attention_interval": 2}, r"full_attention_interval=2 .*; set it to 4$"),
        ("text", {"full_attention_interval": None}, r"full_attention_interval=null .*; set it to 4$"),
        ("text", {"norm_topk_prob": False}, r"norm_topk_prob=false .*; set it to true, or"),
        ("text", {"attn_output_gate": False}, r"attn_output_gate=false .*; set it to true, or"),
        ("text", {"output_gate_type": "sigmoid"}, r'output_gate_type="sigmoid" .*; set it to null, or'),
        ("text", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor of config.json is 0.5 for SGLang .* is 0.25;"),
        ("rope", {"mrope_interleaved": None}, r"rope_parameters.mrope_interleaved of config.json is not set"),
        ("rope", {"rope_type": None}, r"rope_parameters.rope_type of config.json is not set"),
        ("vision", {"deepstack_visual_indexes": None}, r"deepstack_visual_indexes of config.json is not \[\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_sglang_would_compute_in_another_way_is_refused(
    half: str, change: dict[str, Any], message: str, model: Any, tmp_path: Path
) -> None:
    folder = save(model, tmp_path)
    family = family_of(folder)
    family.check_served(family.load_config(str(folder)))
    whole = json.loads((folder / "config.json").read_text())
    text = whole["text_config"]
    section = {"text": text, "rope": text["rope_parameters"], "vision": whole["vision_config"]}[half]
    for key, value in change.items():
        if value is None:
            del section[key]
        else:
            section[key] = value
    (folder / "config.json").write_text(json.dumps(whole))
    with pytest.raises(GspoError, match=message):
        family.check_served(family.load_config(str(folder)))


def test_layers_without_a_period_are_not_served(tmp_path: Path) -> None:
    kinds = ["linear_attention", "full_attention", "full_attention", "linear_attention"]
    folder = save(tiny_hybrid(moe=False, layer_types=kinds), tmp_path)
    family = family_of(folder)
    with pytest.raises(GspoError, match=r"set rollout\.engine=embedded$"):
        family.check_served(family.load_config(str(folder)))


def test_sizes_that_servers_cut_are_named() -> None:
    family = Qwen35()
    for moe, last in ((True, "shared_expert_intermediate_size"), (False, "intermediate_size")):
        hf = tiny_hybrid(moe=moe).config
        dims = {dim.name: dim for dim in family.linear_dims(hf, attention=2, mlp=4, experts=8)}
        assert {name: (dim.size, dim.ways) for name, dim in dims.items() if name.startswith("linear")} == {
            "linear_num_key_heads*linear_key_head_dim": (16, 2),
            "linear_num_value_heads*linear_value_head_dim": (48, 2),
        }
        assert dims[last].ways == 4
    assert "moe_intermediate_size" not in dims
