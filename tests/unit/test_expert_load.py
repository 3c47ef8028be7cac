"""Expert load counts what the router chose for real tokens in updates, by layer."""

from pathlib import Path

import pytest
import torch

from gspo_mm.config import PolicyConfig
from gspo_mm.policy.engine import Policy
from tests.tiny_vl import save, tiny_vl
from tools.check_parity import random_batch


def test_loads_are_those_of_transformers_router(tmp_path: Path) -> None:
    model = tiny_vl(num_hidden_layers=3, mlp_only_layers=[1])
    policy = Policy.from_hf(
        str(save(model, tmp_path / "hf")), PolicyConfig(dtype="float32"), seed=0, total_steps=1
    )
    batch = random_batch(model, images=0)
    chosen: dict[int, torch.Tensor] = {}
    for layer in (0, 2):
        gate = model.model.language_model.layers[layer].mlp.gate
        gate.register_forward_hook(
            lambda _, __, out, layer=layer: chosen.update(
                {layer: chosen.get(layer, 0) + torch.bincount(out[2].flatten(), minlength=8)}
            )
        )
    for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        with torch.no_grad():
            model(input_ids=batch.token_ids[None, start:end])
    policy.logprobs([batch])
    assert policy.expert_load() == {}  # a look is no update
    policy.backward([batch], lambda _, lp, __: (lp.sum(), {}))
    found = policy.expert_load()
    for layer in (0, 2):
        expected = float(chosen[layer].max() / chosen[layer].float().mean())
        assert found[f"moe/load_max/{layer:02d}"] == pytest.approx(expected)
    assert found["moe/load_max"] == max(found["moe/load_max/00"], found["moe/load_max/02"])
    assert found["moe/unused"] == pytest.approx(float(sum((c == 0).sum() for c in chosen.values())) / 16)
    assert policy.expert_load() == {}


def test_a_dense_model_has_no_load(tmp_path: Path) -> None:
    model = tiny_vl(moe=False, num_hidden_layers=3)
    policy = Policy.from_hf(
        str(save(model, tmp_path / "hf")), PolicyConfig(dtype="float32"), seed=0, total_steps=1
    )
    policy.backward([random_batch(model)], lambda _, lp, __: (lp.sum(), {}))
    assert policy.expert_load() == {}
