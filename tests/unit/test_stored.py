"""Folders that hold their weights in another form: experts one by one, matrices in FP8 blocks, or both; or in MXFP4."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Mxfp4Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from gspo_mm.checkpoint.export import export_hf
from gspo_mm.config import ModelConfig, PolicyConfig, load_config
from gspo_mm.families.folder import read_hf
from gspo_mm.families.stored import SCALE, dequantize
from gspo_mm.families.table import family_of
from gspo_mm.hf.headers import HfFolderError
from gspo_mm.policy.engine import Policy
from gspo_mm.serving.served import served
from gspo_mm.sync.quantize import Quantizer, quantize
from tests.tiny_vl import save, tiny_sinks, tiny_vl

type Tensors = dict[str, torch.Tensor]

SINGLE = "model.safetensors"
EXPERT = "model.language_model.layers.1.mlp.experts.3"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Expert matrices [136, 160] and [160, 136]: the last blocks of 128 are not whole."""
    model = tiny_vl(num_hidden_layers=3, hidden_size=160, moe_intermediate_size=136)
    return save(model.bfloat16(), tmp_path_factory.mktemp("moe") / "hf")


def stored(saved: Path, folder: Path, *, fp8: bool, change: Callable[[Tensors], Any] | None = None) -> Path:
    """The folder as it is published in FP8, or in BF16 with experts apart; in two files, experts in both."""
    folder.mkdir()
    for file in saved.iterdir():
        if file.name not in (SINGLE, "config.json"):
            (folder / file.name).write_bytes(file.read_bytes())
    family = family_of(saved)
    quantizer = Quantizer(family, family.load_config(str(saved)))
    if not fp8:
        quantizer._quantized = frozenset()
    tensors = dict(quantizer(read_hf(saved)))
    if change:
        change(tensors)
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"part-{number}.safetensors"
        save_file({n: tensors[n].contiguous() for n in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{SINGLE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((saved / "config.json").read_text())
    if fp8:
        config["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_experts_one_by_one_are_read_as_fused_ones(saved: Path, tmp_path: Path) -> None:
    found, expected = dict(read_hf(stored(saved, tmp_path / "hf", fp8=False))), dict(read_hf(saved))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_blocks_of_fp8_are_read_as_bf16(saved: Path, tmp_path: Path) -> None:
    folder, family = read_hf(stored(saved, tmp_path / "hf", fp8=True)), family_of(saved)
    original, layers = dict(read_hf(saved)), family.linear_layers(family.load_config(str(saved)))
    quantized = {name for parts in layers.values() for name in parts}
    for name, tensor in folder:
        assert tensor.dtype == folder.dtype(name)
        if name not in quantized and ".experts." not in name:
            assert torch.equal(tensor, original[name])
            continue
        assert tensor.dtype == torch.bfloat16
        error = (tensor.float() - original[name].float()).abs().max() / original[name].float().abs().max()
        assert 0 < float(error) < 2**-4


def test_a_block_times_its_scale_is_what_transformers_makes_of_it() -> None:
    weight, scales = quantize(torch.randn(256, 384, generator=torch.Generator().manual_seed(0)))
    theirs = Fp8Dequantize(None)._dequantize_one(weight, scales, torch.bfloat16)
    assert torch.equal(dequantize(weight, scales, (128, 128)), theirs)


def test_a_model_in_fp8_is_trained_and_written_in_bf16(saved: Path, tmp_path: Path) -> None:
    source = stored(saved, tmp_path / "hf", fp8=True)
    policy = Policy.from_hf(str(source), PolicyConfig(), seed=0, total_steps=1)
    out = tmp_path / "out"
    export_hf(policy, out, ModelConfig(path=str(source)))
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    theirs, ours = AutoModelForImageTextToText.from_pretrained(out), dict(read_hf(source))
    assert all(torch.equal(ours[name], parameter) for name, parameter in theirs.named_parameters())


def test_servers_in_bf16_do_not_start_from_its_format(saved: Path, tmp_path: Path) -> None:
    source = stored(saved, tmp_path / "hf", fp8=True)
    settings = [f"model.path={source}", f"run.dir={tmp_path}"]
    config = load_config(Path("configs/quickstart_sglang.yaml"), settings, any_world=True)
    path = Path(served(config).model.path)
    assert path != source
    assert "quantization_config" not in json.loads((path / "config.json").read_text())
    assert not list(path.glob("*.safetensors"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose experts are in MXFP4, all numbers and a good many scales among them."""
    path = save(
        tiny_sinks(num_hidden_layers=2, intermediate_size=96).bfloat16(),
        tmp_path_factory.mktemp("mxfp4") / "hf",
    )
    generator = torch.Generator().manual_seed(0)

    def random(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)

    def pack(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
            experts, columns, rows = tensors.pop(name).shape
            tensors[f"{name}_blocks"] = random(0, 256, experts, rows, columns // 32, 16)
            tensors[f"{name}_scales"] = random(110, 126, experts, rows, columns // 32)

    change_mxfp4(path, pack)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def change_mxfp4(path: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = load_file(path / SINGLE)
    change(tensors)
    save_file(tensors, path / SINGLE, metadata={"format": "pt"})


def test_mxfp4_is_read_as_transformers_reads_it_and_written_in_bf16(packed: Path, tmp_path: Path) -> None:
    raw, ours = load_file(packed / SINGLE), read_hf(packed)
    for name in (n.removesuffix("_blocks") for n in raw if n.endswith("_blocks")):
        theirs = convert_moe_packed_tensors(raw[f"{name}_blocks"], raw[f"{name}_scales"])
        assert ours.dtype(name) == torch.bfloat16
        assert torch.equal(ours.tensor(name), theirs)
    quantized = AutoModelForCausalLM.from_pretrained(packed, quantization_config=Mxfp4Config(dequantize=True))
    loaded = dict(quantized.named_parameters())
    assert dict.fromkeys(loaded, True) == {n: torch.equal(loaded[n].to(t.dtype), t) for n, t in ours}

    policy = Policy.from_hf(str(packed), PolicyConfig(), seed=0, total_steps=1)
    export_hf(policy, tmp_path / "out", ModelConfig(path=str(packed)))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).named_parameters()
    assert all(torch.equal(ours.tensor(n), t.to(ours.dtype(n))) for n, t in written)


LAST = "model.layers.1.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda t: t.pop(f"{LAST}_scales"), f"{LAST}_blocks holds bytes, but no file holds its scales"),
        (
            lambda t: t.pop(f"{LAST}_blocks"),
            f"holds {LAST}_scales, where the model of its config.json has {LAST};",
        ),
        (
            lambda t: t.update({f"{LAST}_scales": t[f"{LAST}_scales"][:4]}),
            "which is not MXFP4 in groups of 32",
        ),
        (
            lambda t: t.update({"model.norm.weight": t[f"{LAST}_scales"][0, 0].clone()}),
            "model.norm.weight holds bytes",
        ),
    ],
)
def test_mxfp4_that_is_not_whole_is_refused(
    change: Callable[[Tensors], Any], fault: str, packed: Path, tmp_path: Path
) -> None:
    path = tmp_path / "hf"
    shutil.copytree(packed, path)
    change_mxfp4(path, change)
    with pytest.raises(HfFolderError, match=fault):
        read_hf(path)


def without(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(name)


def cut(tensors: Tensors) -> None:
    tensors[f"{EXPERT}.up_proj.weight"] = tensors[f"{EXPERT}.up_proj.weight"][:8]


@pytest.mark.parametrize(
    ("fp8", "change", "fault"),
    [
        (False, without(f"{EXPERT}.up_proj.weight"), rf"lacks {re.escape(EXPERT)}.up_proj.weight, one of 1 "),
        (False, cut, rf"{re.escape(EXPERT)}.up_proj.weight has another shape"),
        (True, without(f"{EXPERT}.up_proj.weight{SCALE}"), "is in FP8 but no file holds its scales"),
        (True, without(f"{EXPERT}.up_proj.weight"), "holds .*up_proj.weight_scale_inv|lacks"),
    ],
)
def test_what_is_not_whole_is_refused(
    fp8: bool, change: Callable[[Tensors], Any], fault: str, saved: Path, tmp_path: Path
) -> None:
    with pytest.raises(HfFolderError, match=fault):
        read_hf(stored(saved, tmp_path / "hf", fp8=fp8, change=change))


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"weight_block_size": [64, 64]}, "use the config.json of these weights"),
        ({"weight_block_size": None}, "is quantised"),
        ({"activation_scheme": "static"}, "is quantised"),
        ({"quant_method": "compressed-tensors"}, "quant_method=compressed-tensors"),
    ],
)
def test_other_formats_of_fp8_are_refused(
    settings: dict[str, Any], fault: str, saved: Path, tmp_path: Path
) -> None:
    folder = stored(saved, tmp_path / "hf", fp8=True)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(HfFolderError, match=fault):
        read_hf(folder)


def test_fp8_without_a_word_in_the_config_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = stored(saved, tmp_path / "hf", fp8=True)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(HfFolderError, match="is stored as F8_E4M3"):
        read_hf(folder)
