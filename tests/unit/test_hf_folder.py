"""Hugging Face folders: both layouts of fused experts are read, the published one is written, whole or not at all."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from gspo_mm.families.folder import HfFolderError, read_hf
from gspo_mm.families.table import UnknownFamilyError, family_of
from gspo_mm.families.write import write_hf
from tests.tiny_vl import save, tiny_vl

GATE_UP = "model.language_model.layers.0.mlp.experts.gate_up_proj"
DOWN = "model.language_model.layers.0.mlp.experts.down_proj"


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_vl(num_hidden_layers=3)


@pytest.fixture
def folder(model: Any, tmp_path: Path) -> Path:
    path = save(model, tmp_path / "source")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "tokenizer.json").write_text("{}")
    return path


def parameters(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("layout", ["published", "transformers"])
@pytest.mark.parametrize("given", [True, False])
def test_both_layouts_read_as_transformers_keeps_them(
    model: Any, tmp_path: Path, layout: str, given: bool
) -> None:
    save(model, tmp_path / "hf", layout=layout)
    opened = read_hf(tmp_path / "hf", layout if given else "auto")
    assert opened.experts_layout == layout
    assert_equal(dict(opened), parameters(model))


@pytest.mark.parametrize("inner", [32, 64])
@pytest.mark.parametrize("layout", ["published", "transformers"])
def test_when_one_kind_of_expert_is_square_the_other_tells(tmp_path: Path, inner: int, layout: str) -> None:
    """hidden is 64: gate_up_proj is square at 32, down_proj at 64, never both."""
    square = tiny_vl(num_hidden_layers=3, moe_intermediate_size=inner)
    save(square, tmp_path / "hf", layout=layout)
    assert_equal(dict(read_hf(tmp_path / "hf")), parameters(square))


@pytest.mark.parametrize("layout", ["auto", "published", "transformers"])
def test_without_the_experts_that_tell_the_layout_a_folder_is_no_model(tmp_path: Path, layout: str) -> None:
    square = tiny_vl(num_hidden_layers=3, moe_intermediate_size=32)
    path = save(square, tmp_path / "hf")
    tensors = {k: v for k, v in load_file(path / "model.safetensors").items() if not k.endswith("down_proj")}
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(HfFolderError, match=r"lacks \S+\.down_proj and 2 more"):
        read_hf(path, layout)


def test_a_layout_that_the_dims_contradict_is_refused(folder: Path) -> None:
    with pytest.raises(HfFolderError, match=r"experts_layout=transformers but .* in the published layout"):
        read_hf(folder, "transformers")


def test_mixed_layouts_and_wrong_dims_are_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, DOWN: tensors[DOWN].mT.contiguous()}, folder / "model.safetensors")
    with pytest.raises(HfFolderError, match="mixes both layouts"):
        read_hf(folder)
    save_file({**tensors, DOWN: tensors[DOWN][:, 1:].contiguous()}, folder / "model.safetensors")
    with pytest.raises(
        HfFolderError, match=r"down_proj is \(23, 64\) per expert but config.json makes it \(24, 64\)"
    ):
        read_hf(folder)


def test_what_is_written_is_published_and_loads_in_transformers(
    model: Any, folder: Path, tmp_path: Path
) -> None:
    changed = {name: tensor + 1 for name, tensor in parameters(model).items()}
    out = write_hf(tmp_path / "out", folder, changed.items())
    on_disk = load_file(out / "model.safetensors")
    assert on_disk[GATE_UP].shape == (8, 64, 48)
    assert on_disk[DOWN].shape == (8, 24, 64)
    assert_equal(parameters(AutoModelForImageTextToText.from_pretrained(out)), changed)
    assert_equal(dict(read_hf(out)), changed)
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (out / "tokenizer.json").exists()
    assert json.loads((out / "config.json").read_text()) == json.loads((folder / "config.json").read_text())


def test_a_large_model_is_written_in_shards_with_an_index(model: Any, folder: Path, tmp_path: Path) -> None:
    out = write_hf(tmp_path / "out", folder, parameters(model).items(), shard_bytes=200_000)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(f.stat().st_size < 220_000 for f in files)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in parameters(model).values())
    assert_equal(dict(read_hf(out)), parameters(model))
    assert_equal(parameters(AutoModelForImageTextToText.from_pretrained(out)), parameters(model))
    again = write_hf(tmp_path / "again", out, read_hf(out))  # a sharded folder as the source
    assert_equal(dict(read_hf(again)), parameters(model))
    files[1].unlink()
    with pytest.raises(HfFolderError, match=r"incomplete: model-00002"):
        read_hf(out)


def test_tensors_keep_the_dtype_of_the_source(model: Any, tmp_path: Path) -> None:
    source = save(model, tmp_path / "source", dtype=torch.bfloat16)
    out = write_hf(tmp_path / "out", source, parameters(model).items())
    with safe_open(out / "model.safetensors", framework="pt") as handle:
        assert all(handle.get_tensor(name).dtype is torch.bfloat16 for name in handle.keys())  # noqa: SIM118


def test_tied_models_may_store_the_output_layer_or_leave_it_out(tmp_path: Path) -> None:
    tied = tiny_vl(tied=True, moe=False, num_hidden_layers=3)
    source = save(tied, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tied.lm_head.weight.detach().clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    out = write_hf(tmp_path / "out", source, parameters(tied).items())
    assert_equal(parameters(AutoModelForImageTextToText.from_pretrained(out)), parameters(tied))


def test_a_folder_appears_whole_or_not_at_all(model: Any, folder: Path, tmp_path: Path) -> None:
    tensors = parameters(model)
    out = write_hf(tmp_path / "out", folder, tensors.items())

    def interrupted() -> Any:
        yield from list(tensors.items())[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_hf(out, folder, interrupted())
    assert_equal(dict(read_hf(out)), tensors)  # the old one is still there
    with pytest.raises(KeyboardInterrupt):
        write_hf(tmp_path / "new", folder, interrupted())
    assert not (tmp_path / "new").exists()
    changed = {name: tensor + 1 for name, tensor in tensors.items()}
    assert_equal(dict(read_hf(write_hf(out, folder, changed.items()))), changed)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_a_disk_that_refuses_is_told_in_one_sentence(model: Any, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        HfFolderError, match=r"file/out cannot be written: not a directory; something else stands"
    ):
        write_hf(tmp_path / "file" / "out", folder, parameters(model).items())


def test_tensors_that_are_missing_or_unknown_are_refused(model: Any, folder: Path, tmp_path: Path) -> None:
    some = list(parameters(model).items())
    with pytest.raises(HfFolderError, match=rf"1 tensors of .* were not given, first {some[3][0]};"):
        write_hf(tmp_path / "out", folder, some[:3] + some[4:])
    with pytest.raises(HfFolderError, match=r"model\.extra is not in"):
        write_hf(tmp_path / "out", folder, [*some, ("model.extra", torch.zeros(1))])
    assert not (tmp_path / "out").exists()


def test_square_experts_are_written_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    square = tiny_vl(num_hidden_layers=3, moe_intermediate_size=32)
    source = save(square, tmp_path / "source")
    with caplog.at_level(logging.WARNING):
        out = write_hf(tmp_path / "out", source, parameters(square).items())
    assert "will not transpose" in caplog.text
    assert_equal(dict(read_hf(out)), parameters(square))


def test_folders_that_are_none_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownFamilyError, match=r"has no config\.json"):
        family_of(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(HfFolderError, match=r"has no model\.safetensors"):
        read_hf(folder)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("llama", ""),
        ("glm4v", ", for its norms behind attention and MLP"),
        ("kimi_k25", ", for its latent attention"),
    ],
)
def test_models_of_other_families_are_refused(kind: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(
        UnknownFamilyError, match=f"model_type='{kind}' is not supported{why}; use one of qwen3_vl"
    ):
        read_hf(tmp_path)
