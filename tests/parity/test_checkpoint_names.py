"""Checkpoints name weights as Transformer Engine's layers would: written without a GPU they are read on one."""

from pathlib import Path

from gspo_mm.checkpoint.distributed import _metadata, _model_part
from gspo_mm.config import PolicyConfig
from gspo_mm.policy.engine import Policy


def test_norms_of_a_mixture_have_their_own_names(folder: Path) -> None:
    policy = Policy.from_hf(str(folder), PolicyConfig(dtype="float32"), seed=0, total_steps=1)
    keys = {part.key for part in _model_part(policy.chunks, _metadata())["model"].values()}
    norms = {key for key in keys if "norm" in key and ".layers.0." in key}
    assert {key.rpartition("layers.0.")[2] for key in norms} == {
        "self_attention.linear_qkv.layer_norm_weight",
        "self_attention.q_layernorm.weight",
        "self_attention.k_layernorm.weight",
        "pre_mlp_layernorm.weight",
    }
    assert not [key for key in keys if "_extra_state" in key]
