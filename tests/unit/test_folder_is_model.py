"""A folder is the model that its config.json describes, or it is refused in one sentence before anything is built.

What a folder means is what transformers loads from it.
"""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from gspo_mm.families.folder import HfFolderError, read_hf
from gspo_mm.families.write import write_hf
from tests.tiny_vl import save, tiny_vl

type Tensors = dict[str, torch.Tensor]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
NORM = "model.language_model.norm.weight"
EXPERTS = "model.language_model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_vl(num_hidden_layers=3), tmp_path_factory.mktemp("moe") / "hf")


@pytest.fixture(scope="module")
def saved_tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_vl(moe=False, tied=True, num_hidden_layers=3), tmp_path_factory.mktemp("tied") / "hf")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "hf"))


@pytest.fixture
def tied(saved_tied: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved_tied, tmp_path / "tied"))


def rewrite(folder: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(
        {n: t.clone().contiguous() for n, t in tensors.items()}, folder / SINGLE, metadata={"format": "pt"}
    )


def configure(folder: Path, **values: Any) -> None:
    """Keys of config.json, `text` those of its text_config."""
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= values.pop("text", {})
    (folder / "config.json").write_text(json.dumps(config | values))


def split(folder: Path, *, keep_single: bool = False) -> dict[str, Any]:
    """Put the weights into two files with an index; returns the index."""
    tensors = load_file(folder / SINGLE)
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[:20], names[20:]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    if not keep_single:
        (folder / SINGLE).unlink()
    return index


def as_transformers_loads(folder: Path) -> Tensors:
    return dict(AutoModelForImageTextToText.from_pretrained(folder).named_parameters())


def assert_reads_as_transformers(folder: Path) -> None:
    ours, theirs = dict(read_hf(folder)), as_transformers_loads(folder)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# the output layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_folder_with_a_head_of_its_own_is_refused(tied: Path, dtype: torch.dtype) -> None:
    """transformers does not tie the two, SGLang does: the folder is two models."""
    rewrite(tied, lambda t: t.update({HEAD: (t[EMBEDDING] * 2).to(dtype)}))
    assert HEAD in as_transformers_loads(tied)
    with pytest.raises(
        HfFolderError, match=r"tie_word_embeddings=true, but lm_head.weight differs from .*; .*=false"
    ):
        read_hf(tied)


def test_one_number_of_the_head_makes_the_difference(tied: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[HEAD] = tensors[EMBEDDING].clone()
        tensors[HEAD][-1, -1] += 1e-3

    rewrite(tied, change)
    with pytest.raises(HfFolderError, match="differs from"):
        read_hf(tied)


def test_a_head_that_is_the_embedding_is_read_as_transformers_does(tied: Path, tmp_path: Path) -> None:
    rewrite(tied, lambda t: t.update({HEAD: t[EMBEDDING].clone()}))
    assert_reads_as_transformers(tied)
    assert_reads_as_transformers(write_hf(tmp_path / "out", tied, read_hf(tied)))


def test_what_the_refusal_of_a_head_advises_is_what_transformers_uses(saved_tied: Path, tied: Path) -> None:
    rewrite(tied, lambda t: t.update({HEAD: t[EMBEDDING] * 2}))
    wanted = as_transformers_loads(tied)
    configure(tied, tie_word_embeddings=False)
    assert_reads_as_transformers(tied)
    assert torch.equal(dict(read_hf(tied))[HEAD], wanted[HEAD])


def test_an_untied_folder_without_a_head_is_refused(folder: Path) -> None:
    """transformers would draw it at random."""
    rewrite(folder, lambda t: t.pop(HEAD))
    with pytest.raises(
        HfFolderError, match=r"tie_word_embeddings=false, but no file holds lm_head\.weight; set it to"
    ):
        read_hf(folder)


def test_the_flag_of_the_text_config_does_not_tie(folder: Path) -> None:
    configure(folder, text={"tie_word_embeddings": True})
    assert_reads_as_transformers(folder)


# names and shapes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(extra=torch.ones(2)), r"holds extra, which the model of its config\.json does not have"),
        (lambda t: t.update({"model.language_model.layers.3.input_layernorm.weight": t[NORM]}), r"layers\.3\.input"),
        (lambda t: t.update({"mtp.fc.weight": t[NORM], "mtp.norm.weight": t[NORM]}), r"mtp\.fc\.weight and 1 more"),
        (lambda t: t.update({"lm_head.bias": torch.ones(256)}), r"lm_head\.bias"),
        (lambda t: t.pop(NORM), r"lacks model\.language_model\.norm\.weight, which"),
        (lambda t: [t.pop(n) for n in list(t) if "visual.blocks.1" in n], r"lacks model\.visual\.blocks\.1\S+ and \d+"),
        (lambda t: [t.pop(n) for n in list(t) if n.endswith("down_proj")], r"lacks \S+down_proj and 2 more"),
        (lambda t: t.update({f"old.{n}": t.pop(n) for n in list(t)}), r"holds old\.lm_head\S+ and \d+ more, where"),
        (lambda t: t.update({NORM: t[NORM][:-1]}), r"norm\.weight is \(63,\) but config\.json makes it \(64,\)"),
        (lambda t: t.update({EMBEDDING: t[EMBEDDING][:250]}), r"is \(250, 64\) but config\.json makes it \(256, 64\)"),
        (lambda t: t.update({f"{EXPERTS}.gate_up_proj": t[f"{EXPERTS}.gate_up_proj"][:7]}), r"is \(7, 64, 48\) but"),
        (lambda t: t.update({NORM: t[NORM].to(torch.int32)}), r"norm\.weight is stored as I32, and only"),
        (lambda t: t.update({NORM: t[NORM].to(torch.float8_e4m3fn)}), r"stored as F8_E4M3, .* checkpoint in BF16"),
        (lambda t: t.update({f"{NORM}_scale_inv": torch.ones(1)}), r"holds \S+_scale_inv: its weights are quantised"),
        (lambda t: t.update({"q_proj.qweight": torch.ones(1)}), r"holds q_proj\.qweight: its weights are quantised"),
        (lambda t: t.update({"x.lora_A.weight": torch.ones(1)}), "holds x.lora_A.weight: it holds an adapter"),
    ],
)  # fmt: skip
def test_tensors_that_are_not_those_of_the_config_are_refused(
    folder: Path, change: Callable[[Tensors], Any], message: str
) -> None:
    rewrite(folder, change)
    with pytest.raises(HfFolderError, match=message):
        read_hf(folder)


def test_a_config_of_fewer_layers_is_refused(folder: Path) -> None:
    configure(folder, text={"num_hidden_layers": 2})
    with pytest.raises(
        HfFolderError, match=r"layers\.2\.\S+ and \d+ more, which the model of its config\.json does not"
    ):
        read_hf(folder)


def test_tensors_that_are_computed_are_named_and_left_out(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = "model.language_model.rotary_emb.inv_freq"
    rewrite(folder, lambda t: t.update({name: torch.ones(8)}))
    with caplog.at_level(logging.WARNING):
        assert_reads_as_transformers(folder)
    assert name in caplog.text
    assert_reads_as_transformers(write_hf(tmp_path / "out", folder, read_hf(folder)))


# the configuration


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, r"is quantised \(quant_method=fp8 .*BF16"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quant_method=gptq"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method=awq"),
        ({"text": {"quantization_config": {"load_in_4bit": True}}}, r"quant_method=\?"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        (
            {"text": {"num_experts_per_tok": 1}},
            r"num_experts_per_tok=1 .*use a model with 2 to 8 experts per token",
        ),
        ({"text": {"num_experts_per_tok": 9}}, r"num_experts_per_tok=9 with num_experts=8"),
        ({"text": {"hidden_act": "gelu"}}, "hidden_act='gelu' is not supported"),
    ],
)
def test_a_config_that_cannot_be_trained_is_refused(folder: Path, values: Any, message: str) -> None:
    configure(folder, **values)
    with pytest.raises(HfFolderError, match=message):
        read_hf(folder)


@pytest.mark.parametrize("text", ["{", "[]", "", "\udcff"])
def test_a_config_that_is_none_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(HfFolderError, match=r"config\.json (cannot be read|holds no JSON object)"):
        read_hf(folder)


# files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda whole: whole[:-5], r"model\.safetensors cannot be read .*cut off.*download or copy it again"),
        (lambda whole: whole[:100], "cannot be read"),
        (lambda _: b"", "it is empty"),
        (lambda _: b"<html>" * 50, "no safetensors file"),
        (lambda whole: bytes(len(whole)), "cannot be read"),
        (
            lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "run `git lfs pull`",
        ),
    ],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_damaged_file_is_named(
    folder: Path, sharded: bool, content: Callable[[bytes], bytes], message: str
) -> None:
    if sharded:
        split(folder)
    file = folder / ("model-00002-of-00002.safetensors" if sharded else SINGLE)
    file.write_bytes(content(file.read_bytes()))
    with pytest.raises(HfFolderError, match=message.replace("model\\", file.stem)):
        read_hf(folder)


def test_an_index_and_its_files_are_read_as_transformers_does(folder: Path) -> None:
    split(folder)
    assert_reads_as_transformers(folder)


def test_an_index_of_the_single_file_is_no_second_model(folder: Path) -> None:
    names = load_file(folder / SINGLE)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, SINGLE)}))
    assert_reads_as_transformers(folder)


@pytest.mark.parametrize("shards_are_there", [True, False])
def test_an_index_beside_another_file_is_refused(folder: Path, shards_are_there: bool) -> None:
    split(folder, keep_single=True)
    rewrite(folder, lambda t: t.update({NORM: t[NORM] * 2}))
    if not shards_are_there:
        for file in folder.glob("model-*"):
            file.unlink()
    with pytest.raises(
        HfFolderError, match=r"holds model\.safetensors and .*index\.json, .*take away what is old"
    ):
        read_hf(folder)
    for file in [folder / INDEX, *folder.glob("model-*")]:
        file.unlink(missing_ok=True)
    assert_reads_as_transformers(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m.pop(NORM),
            r"holds model\.language_model\.norm\.weight, which .*index\.json does not name",
        ),
        (
            lambda m: m.update(more=m[NORM]),
            r"says that more is in model-0000\d-of-00002\.safetensors, which does not",
        ),
        (lambda m: m.update(dict.fromkeys(m, m[HEAD])), "holds no|does not hold it"),
        (
            lambda m: m.update(more="model-00003-of-00003.safetensors"),
            r"incomplete: model-00003-of-00003\.safetensors",
        ),
        (lambda m: m.clear(), "has no weight_map"),
        (lambda m: m.update({NORM: 3}), "has no weight_map"),
    ],
)
def test_an_index_that_is_not_of_its_files_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    index = split(folder)
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(HfFolderError, match=message):
        read_hf(folder)


def test_a_tensor_in_two_files_is_refused(folder: Path) -> None:
    split(folder)
    second = folder / "model-00002-of-00002.safetensors"
    first = load_file(folder / "model-00001-of-00002.safetensors")
    name = min(first)
    save_file({**load_file(second), name: first[name] * 2}, second, metadata={"format": "pt"})
    with pytest.raises(HfFolderError, match=rf"holds {name} twice, in model-00001\S+ and model-00002"):
        read_hf(folder)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("pytorch_model.bin", r"pickles \(\.bin.*save_pretrained"),
        ("model-q4.gguf", "GGUF files are not read"),
        ("model-00001-of-00002.safetensors", "nothing without an index"),
        ("README.md", "download the weights first"),
    ],
)
def test_other_weights_than_safetensors_are_named(folder: Path, file: str, message: str) -> None:
    (folder / SINGLE).rename(folder / file)
    with pytest.raises(HfFolderError, match=r"has no model\.safetensors and no .*" + message):
        read_hf(folder)


def test_what_the_refusal_of_pickles_advises_works(saved: Path, folder: Path, tmp_path: Path) -> None:
    torch.save(load_file(folder / SINGLE), folder / "pytorch_model.bin")
    (folder / SINGLE).unlink()
    AutoModelForImageTextToText.from_pretrained(folder).save_pretrained(tmp_path / "new")
    found = dict(read_hf(tmp_path / "new"))
    assert all(torch.equal(found[name], tensor) for name, tensor in read_hf(saved))


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("alone", [True, False])
def test_an_adapter_is_refused(folder: Path, file: str, alone: bool) -> None:
    """With one, transformers loads another folder's weights."""
    (folder / file).write_text("{}")
    if alone:
        (folder / SINGLE).unlink()
    with pytest.raises(HfFolderError, match=r"holds an adapter .*merge_and_unload"):
        read_hf(folder)
