"""GLM-4.5V: the router's bias is a value that nothing changes or rounds; variants that are refused by name. Costs 8 s."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gspo_mm.checkpoint.convert import hf_to_megatron, megatron_to_hf
from gspo_mm.config import PolicyConfig
from gspo_mm.families.folder import read_hf
from gspo_mm.families.table import FAMILIES
from gspo_mm.families.write import write_hf
from gspo_mm.hf.headers import HfFolderError
from gspo_mm.policy.engine import Policy
from gspo_mm.serving.served import tensor_dtypes, tensor_names, weight_map
from tests.tiny_vl import save, tiny_glm
from tools.check_parity import random_batch

BIAS = "model.language_model.layers.{}.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_glm(num_hidden_layers=3)


@pytest.fixture
def folder(model: Any, tmp_path: Path) -> Path:
    """As published: weights in BF16, biases in float32 with digits that BF16 does not have."""
    path = save(model, tmp_path / "hf", dtype=torch.bfloat16)
    file = path / "model.safetensors"
    tensors = load_file(file)
    tensors |= {BIAS.format(n): model.state_dict()[BIAS.format(n)].clone() for n in (1, 2)}
    save_file(tensors, file, metadata={"format": "pt"})
    return path


def biases(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.endswith("bias") and ".gate." in name}


def assert_kept(found: dict[str, torch.Tensor], model: Any) -> None:
    expected = biases(model.state_dict())
    assert found.keys() == expected.keys()
    assert len(found) == 2
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name])
        assert not torch.equal(tensor, tensor.bfloat16().float())


def test_updates_of_a_policy_in_bf16_leave_the_bias_to_the_bit(
    model: Any, folder: Path, tmp_path: Path
) -> None:
    config = PolicyConfig.model_validate({"dtype": "bfloat16", "optimizer": {"lr": 1e-2}})
    policy = Policy.from_hf(str(folder), config, seed=0, total_steps=2)
    before = {name: tensor.clone() for name, tensor in policy.export()}
    for number in range(2):
        batch = random_batch(model, images=2, seed=number)
        policy.update([batch], lambda _, logprobs, __: (logprobs.sum(), {}), last=number == 1)
    after = dict(policy.export())
    gate = BIAS.format(1).replace("e_score_correction_bias", "weight")
    assert not torch.equal(after[gate], before[gate])
    assert_kept(biases(after), model)
    sent = {
        name: tensor
        for rank in policy.weights.senders(policy.ranks)
        for name, tensor in policy.weights.export_own(rank)
    }
    assert_kept(biases(sent), model)
    assert_kept(
        biases(load_file(write_hf(tmp_path / "out", folder, after.items()) / "model.safetensors")), model
    )


def test_a_folder_of_bf16_and_biases_is_converted_in_bf16_there_and_back(
    model: Any, folder: Path, tmp_path: Path
) -> None:
    hf_to_megatron(folder, tmp_path / "megatron", check=True)
    stored = sum(f.stat().st_size for f in (tmp_path / "megatron/policy").iterdir())
    weights = sum(p.numel() for p in model.parameters())
    assert stored < 3.5 * weights  # bytes; in float32 they would be 4 each
    megatron_to_hf(tmp_path / "megatron", tmp_path / "out", hf=tmp_path / "megatron/hf", check=True)
    found = load_file(tmp_path / "out/model.safetensors")
    assert "model.language_model.layers.1.mlp.experts.7.down_proj.weight" in found
    assert_kept(biases(found), model)
    read, back = dict(read_hf(folder)), dict(read_hf(tmp_path / "out"))
    assert back.keys() == read.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in read.items())


def test_servers_get_the_bias_in_float32_and_know_what_they_keep_whole(model: Any) -> None:
    family, hf = FAMILIES["glm4v_moe"].family, model.config
    names = list(tensor_names(weight_map(family, hf)))
    dtypes = tensor_dtypes(names, quantized=(), kept="bfloat16", constants=family.constants)
    assert {name for name, dtype in dtypes.items() if dtype == "float32"} == {BIAS.format(1), BIAS.format(2)}
    of_server = {family.whole_tensor(name) for name in names} - {None}
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in of_server
    assert {"model.norm.weight", "visual.downsample.bias", "visual.patch_embed.proj.weight"} < of_server
    assert "model.layers.1.mlp.gate.weight" not in of_server


def test_sizes_that_servers_cut_are_named(model: Any) -> None:
    family = FAMILIES["glm4v_moe"].family
    dims = family.linear_dims(model.config, attention=2, mlp=4, experts=8)
    named = {dim.name: (dim.size, dim.ways) for dim in dims}
    assert named["n_shared_experts*moe_intermediate_size"] == (24, 4)
    assert named["intermediate_size"] == (96, 4)
    assert named["moe_intermediate_size"] == (24, 8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_act": "gelu"}, r"hidden_act='gelu' is not supported; use 'silu'"),
        ({"use_qk_norm": True}, r"text_config\.use_qk_norm=true is not supported; use false"),
        ({"num_experts_per_tok": 1}, r"num_experts_per_tok=1 with num_local_experts=8 .*2 to 8"),
        ({"norm_topk_prob": False}, r"norm_topk_prob=false is not supported .*use true"),
        ({"n_shared_experts": 0}, r"n_shared_experts=0 is not supported"),
        ({"n_group": 3}, r"n_group=3 with topk_group=1 .*use groups of equal size"),
        ({"n_group": 2, "topk_group": 3}, r"topk_group=3 .*from 1 to n_group"),
        ({"n_group": 2, "num_experts_per_tok": 3}, r"topk_group=1 with num_experts_per_tok=3 .*use a model with 1 groups"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}, "that sum to 4"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "mrope_section=None .*that sum to 4"),
    ],
    ids=str,
)  # fmt: skip
def test_variants_that_are_not_supported_are_refused_by_name(
    values: dict[str, Any], message: str, folder: Path
) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= values
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(HfFolderError, match=message):
        read_hf(folder)
