"""The share of routing decisions that weights of before and of now agree on is that of transformers' own routers."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_mm.config import PolicyConfig
from gspo_mm.families.folder import read_hf
from gspo_mm.policy.engine import Policy
from gspo_mm.policy.routing_audit import RoutingAudit
from gspo_mm.types import MicroBatch
from tests.tiny_vl import save, tiny_vl
from tools.check_parity import random_batch

MIXTURES = (0, 2)


def choices(model: Any, batch: MicroBatch) -> dict[int, torch.Tensor]:
    """By layer [tokens, experts] bool, what transformers' routers choose for each sequence by itself."""
    chosen: dict[int, list[torch.Tensor]] = {layer: [] for layer in MIXTURES}
    layers = model.model.language_model.layers
    hooks = [
        layers[layer].mlp.gate.register_forward_hook(
            lambda _, __, out, kept=kept: kept.append(
                torch.zeros(len(out[2]), 8).scatter(1, out[2], 1.0).bool()
            )
        )
        for layer, kept in chosen.items()
    ]
    for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        with torch.no_grad():
            model(input_ids=batch.token_ids[None, start:end])
    for hook in hooks:
        hook.remove()
    return {layer: torch.cat(parts) for layer, parts in chosen.items()}


def test_agreement_is_that_of_transformers_routers(tmp_path: Path) -> None:
    before = tiny_vl(num_hidden_layers=3, mlp_only_layers=[1])
    now = copy.deepcopy(before)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in now.parameters():
            parameter += 0.3 * parameter.std() * torch.randn_like(parameter)
    old, new = (str(save(model, tmp_path / name)) for name, model in (("old", before), ("new", now)))
    policy = Policy.from_hf(old, PolicyConfig(dtype="float32"), seed=0, total_steps=1)
    batch = random_batch(before, images=0)
    audit = RoutingAudit(policy, [batch])
    unchanged = {"routing/agree": 1.0, **{f"routing/agree/{layer:02d}": 1.0 for layer in MIXTURES}}
    assert audit.compare() == unchanged
    policy.load_hf(read_hf(new))
    found = audit.compare()
    first, second = choices(before, batch), choices(now, batch)
    same = {layer: int((first[layer] & second[layer]).sum()) for layer in MIXTURES}
    decisions = 2 * batch.num_tokens  # of a layer, with two experts to a token
    assert 0 < sum(same.values()) < 2 * decisions
    assert found == pytest.approx(
        {
            "routing/agree": sum(same.values()) / (2 * decisions),
            **{f"routing/agree/{layer:02d}": same[layer] / decisions for layer in MIXTURES},
        }
    )


def test_a_dense_model_has_no_routing(tmp_path: Path) -> None:
    model = tiny_vl(moe=False, num_hidden_layers=3)
    folder = str(save(model, tmp_path / "hf"))
    policy = Policy.from_hf(folder, PolicyConfig(dtype="float32"), seed=0, total_steps=1)
    assert RoutingAudit(policy, [random_batch(model)]).compare() == {}
