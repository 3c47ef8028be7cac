"""The forms in which folders hold one model, for every family: each is read as transformers reads it, or refused by name.

About half a minute: models of two to four layers, saved and loaded again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import FineGrainedFP8Config
from typer.testing import CliRunner

from gspo_mm.families.folder import read_hf
from gspo_mm.families.operations import StackExperts
from gspo_mm.families.table import FAMILIES, family_of
from gspo_mm.hf.headers import HfFolderError
from gspo_mm.sync.quantize import quantize
from tests.tiny_vl import save, tiny_glm, tiny_hybrid, tiny_sinks, tiny_text, tiny_vl, tiny_windows
from tools import check_parity

type Tensors = dict[str, torch.Tensor]

FILE = "model.safetensors"
MODELS: dict[str, Callable[..., Any]] = {
    "qwen3_vl": lambda **more: tiny_vl(moe=False, **more),
    "qwen3_vl_moe": tiny_vl,
    "qwen3_5": lambda **more: tiny_hybrid(moe=False, **more),
    "qwen3_5_moe": tiny_hybrid,
    "qwen2_5_vl": tiny_windows,
    "glm4v_moe": tiny_glm,
    "gpt_oss": tiny_sinks,
    "qwen3": lambda **more: tiny_text(moe=False, **more),
    "qwen3_moe": tiny_text,
}
MIXTURES = [name for name in MODELS if name.endswith("_moe")]
# transformers does not read experts one by one of one family; test_stored.py compares those with fused ones
APART = [name for name in MIXTURES if name != "qwen3_vl_moe"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Path]:
    """family, tied -> a folder in BF16, in one file, experts as transformers saves them."""
    parent, made = tmp_path_factory.mktemp("models"), {}

    def get(name: str, tied: bool) -> Path:
        if (name, tied) not in made:
            model = MODELS[name](tied=tied, vocab_size=250)
            made[name, tied] = save(model.bfloat16(), parent / f"{name}{tied}", dtype=torch.bfloat16)
        return made[name, tied]

    return get


def copied(source: Path, folder: Path, change: Callable[[Tensors], Any], **config: Any) -> Path:
    """The folder with other tensors, in two files that each hold a part of every layer."""
    folder.mkdir()
    tensors = load_file(source / FILE)
    change(tensors)
    weight_map = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in sorted(set(weight_map.values())):
        part = {name: tensors[name].contiguous() for name in tensors if weight_map[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / f"{FILE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | config))
    return folder


def assert_reads_as_transformers(folder: Path, **options: Any) -> None:
    family = family_of(folder)
    kind = family.auto_class(family.load_config(str(folder)))
    theirs = dict(kind.from_pretrained(folder, dtype=torch.bfloat16, **options).named_parameters())
    ours = dict(read_hf(folder))
    assert theirs.keys() <= ours.keys()
    # what is no parameter there: biases of sigmoid routers
    assert all(name.endswith(family.constants) for name in ours.keys() - theirs.keys())
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def stack(tensors: Tensors, source: Path) -> None:
    """Fused experts, as transformers has them."""
    tensors |= {name: tensor for name, tensor in read_hf(source) if ".experts." in name}
    for name in [name for name in tensors if ".experts." in name and name.split(".experts.")[1][0].isdigit()]:
        del tensors[name]


def take_apart(tensors: Tensors, source: Path) -> None:
    """Experts one by one."""
    stack(tensors, source)
    family = family_of(source)
    hf = family.load_config(str(source))
    for entry in family.weight_map(hf, padded_vocab=hf.get_text_config().vocab_size, fused=False):
        if isinstance(entry.op, StackExperts):
            for expert, whole in enumerate(tensors.pop(entry.hf[0])):
                names = entry.op.names_apart(entry.hf[0], expert)
                tensors |= zip(names, whole.chunk(len(names)), strict=True)


def test_every_family_is_among_them() -> None:
    assert MODELS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_files_that_share_a_layers_tensors_are_read(
    name: str, tied: bool, saved: Any, tmp_path: Path
) -> None:
    assert_reads_as_transformers(copied(saved(name, tied), tmp_path / "hf", lambda tensors: None))


@pytest.mark.parametrize("name", MODELS)
def test_the_head_of_a_tied_model_may_be_there_if_it_is_the_embedding(
    name: str, saved: Any, tmp_path: Path
) -> None:
    def head(tensors: Tensors, factor: float) -> None:
        embedding = next(tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight"))
        tensors["lm_head.weight"] = factor * embedding

    assert_reads_as_transformers(
        copied(saved(name, True), tmp_path / "same", lambda tensors: head(tensors, 1))
    )
    other = copied(saved(name, True), tmp_path / "other", lambda tensors: head(tensors, 2))
    with pytest.raises(HfFolderError, match=r"tie_word_embeddings=true, but lm_head\.weight differs"):
        read_hf(other)


@pytest.mark.parametrize(
    ("name", "form"), [*((name, stack) for name in MIXTURES), *((name, take_apart) for name in APART)]
)
def test_experts_fused_or_one_by_one_over_files_are_read(
    name: str, form: Callable[..., None], saved: Any, tmp_path: Path
) -> None:
    source = saved(name, False)
    folder = copied(source, tmp_path / "hf", lambda tensors: form(tensors, source))
    assert_reads_as_transformers(folder)


def test_experts_with_biases_one_by_one_are_refused(saved: Any, tmp_path: Path) -> None:
    def apart(tensors: Tensors) -> None:
        for whole in [n for n in tensors if ".experts.down_proj" in n]:
            kind = "bias" if whole.endswith("_bias") else "weight"
            parent = whole.partition(".down_proj")[0]
            tensors |= {f"{parent}.{e}.down_proj.{kind}": one for e, one in enumerate(tensors.pop(whole))}

    folder = copied(saved("gpt_oss", False), tmp_path / "hf", apart)
    with pytest.raises(
        HfFolderError, match=r"experts\.0\.down_proj\.bias and .*; use the names that transformers"
    ):
        read_hf(folder)


def in_fp8(source: Path, folder: Path) -> Path:
    """The folder with its decoder's matrices in FP8 blocks, experts one by one."""

    def shrink(tensors: Tensors) -> None:
        if source.name.startswith(tuple(MIXTURES)):
            take_apart(tensors, source)
        for weight in [n for n in tensors if ".layers." in n and n.endswith("_proj.weight")]:
            tensors[weight], tensors[f"{weight}_scale_inv"] = quantize(tensors[weight])

    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    return copied(source, folder, shrink, quantization_config=settings)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "qwen3_vl_moe"])
def test_blocks_of_fp8_are_read(name: str, saved: Any, tmp_path: Path) -> None:
    folder = in_fp8(saved(name, False), tmp_path / "hf")
    assert_reads_as_transformers(folder, quantization_config=FineGrainedFP8Config(dequantize=True))


def one_by_one(source: Path, folder: Path) -> Path:
    return copied(source, folder, lambda tensors: take_apart(tensors, source))


@pytest.mark.parametrize(("name", "form"), [("qwen3_moe", in_fp8), ("qwen3_vl_moe", one_by_one)])
def test_folders_that_transformers_reads_in_part_are_compared(
    name: str, form: Callable[..., Path], saved: Any, tmp_path: Path
) -> None:
    folder = form(saved(name, False), tmp_path / "hf")
    result = CliRunner().invoke(check_parity.app, ["--hf", str(folder)])
    assert result.exit_code == 0, result.output


def moved(source: Path, folder: Path) -> Path:
    """The folder with the decoder's keys in the other place: beside model_type, or in a text_config."""
    folder = copied(source, folder, lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    if text := config.pop("text_config", None):
        config = text | config
    else:
        kept = {key: config.pop(key) for key in ("model_type", "architectures")}
        config = {**kept, "text_config": config}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", ["qwen2_5_vl", "glm4v_moe"])
def test_keys_of_the_decoder_are_read_flat_where_transformers_does(
    name: str, saved: Any, tmp_path: Path
) -> None:
    assert_reads_as_transformers(moved(saved(name, False), tmp_path / "hf"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qwen3_vl", "=64 of config.json is not in text_config, .* put the decoder's keys there"),
        ("qwen3_vl_moe", "=64 of config.json is not in text_config"),
        ("qwen3_5", "=64 of config.json is not in text_config"),
        ("qwen3_5_moe", "=64 of config.json is not in text_config"),
        ("gpt_oss", "has a text_config, which .* type gpt_oss; put its keys beside model_type"),
        ("qwen3", "has a text_config"),
        ("qwen3_moe", "has a text_config"),
    ],
)
def test_keys_where_transformers_passes_over_them_are_refused(
    name: str, message: str, saved: Any, tmp_path: Path
) -> None:
    with pytest.raises(HfFolderError, match=message):
        read_hf(moved(saved(name, False), tmp_path / "hf"))
