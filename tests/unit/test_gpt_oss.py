"""What gpt-oss cannot do is refused by key, value and fix."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gspo_mm.config import Config, PolicyConfig, parse_config
from gspo_mm.config.layout import PlanError
from gspo_mm.families.folder import read_hf
from gspo_mm.families.gpt_oss import GptOss
from gspo_mm.families.table import family_of
from gspo_mm.families.write import TEMPLATE
from gspo_mm.hf.headers import HfFolderError
from gspo_mm.policy.engine import Policy
from gspo_mm.policy.parallel import ParallelPlan
from gspo_mm.serving.served import check_served, served
from gspo_mm.types import GspoError
from tests.tiny_vl import save, tiny_sinks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tiny_sinks(num_hidden_layers=2), tmp_path / "hf")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attention_bias": False}, "attention_bias=false is not supported"),
        ({"swiglu_alpha": 1.5}, r"swiglu_alpha=1.5 is not supported; use 1.702"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"sliding_window": None}, "sliding_window=None is not supported"),
        ({"sliding_window": 0}, "sliding_window=0 is not supported"),
        ({"num_experts_per_tok": 1}, "use a model with 2 to 8 experts per token"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type='dynamic' is not supported; use one of default, yarn",
        ),
    ],
)
def test_a_variant_that_is_not_supported_is_refused_by_name(
    values: dict[str, Any], message: str, folder: Path
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    with pytest.raises(HfFolderError, match=message):
        read_hf(folder)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"tp": 2, "etp": 2},
            r"etp=2 \(null: tp\) would cut experts that have biases.*set policy.parallel.etp=1",
        ),
        ({"tp": 2, "cp": 2}, "tp=2 times cp=2 does not divide the model's num_key_value_heads=2"),
    ],
)
def test_a_layout_that_would_cut_what_cannot_be_cut_is_refused(
    sizes: dict[str, int], message: str, folder: Path
) -> None:
    family = family_of(folder)
    with pytest.raises(PlanError, match=message):
        ParallelPlan(**sizes).check_model(family.dims(family.load_config(str(folder))))


def test_adapters_beside_experts_are_refused_and_others_are_not(folder: Path) -> None:
    def lora(*targets: str) -> Policy:
        config = PolicyConfig.model_validate({"lora": {"rank": 2, "alpha": 4, "targets": list(targets)}})
        return Policy.from_hf(str(folder), config, seed=0, total_steps=1)

    with pytest.raises(
        PlanError, match=r"policy.lora.targets names experts, and those of .* gpt_oss .* take it off"
    ):
        lora("attention", "experts")
    names = lora("attention").adapters[0].names()
    assert names == [f"model.layers.{n}.self_attn.{x}_proj.weight" for n in range(2) for x in "oqkv"]


# servers


def serving(folder: Path, tmp_path: Path, **sglang: Any) -> Config:
    return parse_config(
        {
            "run": {"name": "run", "dir": str(tmp_path)},
            "model": {"path": str(folder)},
            "data": {"train": ["none.tar"]},
            "reward": {"file": "configs/rewards/arithmetic.yaml"},
            "rollout": {"engine": "sglang", "sglang": sglang},
        }
    )


def test_what_servers_cannot_compute_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(GspoError, match=r"without GPUs cannot compute .*set rollout.engine=embedded"):
        check_served(serving(folder, tmp_path))
    check_served(serving(folder, tmp_path, start="elsewhere"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_served(serving(folder, tmp_path))
    with pytest.raises(GspoError, match=r"in FP8 of models of type gpt_oss; set rollout.sglang.fp8=false"):
        check_served(serving(folder, tmp_path, fp8=True))
    tied = save(tiny_sinks(num_hidden_layers=2, tied=True), tmp_path / "tied")
    with pytest.raises(GspoError, match="tie_word_embeddings=true, which SGLang ignores"):
        check_served(serving(tied, tmp_path))


def test_servers_are_sent_what_transformers_saves(folder: Path) -> None:
    policy = Policy.from_hf(str(folder), PolicyConfig(dtype="float32"), seed=0, total_steps=1)
    expected = load_file(folder / "model.safetensors")
    for sent in (dict(policy.weights.export_own(0)), dict(policy.weights.export(experts_apart=True))):
        assert sent.keys() == expected.keys()
        assert all(torch.equal(sent[name], tensor) for name, tensor in expected.items())


def test_servers_of_a_model_in_mxfp4_start_in_bf16(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    quantization = {"quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(config | quantization))
    template = Path(served(serving(folder, tmp_path)).model.path)
    assert template != folder
    assert "quantization_config" not in json.loads((template / "config.json").read_text())
    assert set(json.loads((template / TEMPLATE).read_text())) == set(load_file(folder / "model.safetensors"))


# numbers


@pytest.mark.parametrize(("length", "expected"), [(4, 10), (5, 15), (9, 35)])
def test_pairs_of_a_window_are_counted_one_by_one(length: int, expected: int) -> None:
    flops = GptOss().flops(tiny_sinks(layer_types=["sliding_attention"] * 4).config)
    assert flops.pair == 0
    assert flops.pairs(length) == flops.window_pair * expected


def test_angles_and_their_scale_are_transformers(folder: Path) -> None:
    model = tiny_sinks()
    family = family_of(folder)
    hf = family.load_config(str(folder))
    positions = torch.tensor([[0, 1, 7, 300]])
    cos, sin = model.model.rotary_emb(torch.zeros(1), positions)
    scale = float((cos**2 + sin**2).sqrt().mean())
    angles = family.build_rotary(hf)(positions)[:, : hf.head_dim // 2]
    torch.testing.assert_close(cos[0], angles.cos() * scale)
    torch.testing.assert_close(sin[0], angles.sin() * scale)
    assert scale > 1.1
    assert family.transformer_arguments(hf)["softmax_scale"] == pytest.approx(hf.head_dim**-0.5 * scale**2)
