"""Folders of Qwen3.5: experts in any form, layers that are carried along, variants that are refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from gspo_mm.families import read_hf
from gspo_mm.families.write import copy_template, write_hf
from gspo_mm.hf.headers import HfFolderError
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
