"""Adapters beside Transformer Engine's layers: what they compute beside local ones, also where the weights are FP8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_mm.config import PolicyConfig
from gspo_mm.policy import spec
from gspo_mm.policy.engine import Policy
from gspo_mm.policy.weights import gradient_of
from tests.parallel.layouts import set_pairs
from tests.te.inside import ON_CARD
from tests.tiny_vl import save, tiny_hybrid, tiny_vl, wide_vl
from tools.check_parity import random_batch

MODELS: dict[str, Any] = {
    "a mixture with a dense layer": (lambda: tiny_vl(mlp_only_layers=[1]), ["mlp", "experts", "projector"]),
    "linear attention, a shared expert": (tiny_hybrid, ["mlp", "experts"]),
}


def adapted(folder: Path, targets: list[str], *, dtype: str = "float32", **settings: Any) -> Policy:
    lora = {"rank": 3, "alpha": 6, "targets": ["attention", *targets]}
    optimizer = {"lr": 1e-2}
    config = PolicyConfig.model_validate({"dtype": dtype, "lora": lora, "optimizer": optimizer, **settings})
    policy = Policy.from_hf(str(folder), config, seed=0, total_steps=10)
    set_pairs(policy)
    return policy


def loss(_: int, logprobs_R: torch.Tensor, __: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    return -1e-2 * logprobs_R.sum(), {}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_and_merged_weights_are_those_of_local_layers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, targets = MODELS[name]
    model = make()
    folder = save(model, tmp_path / "hf", layout="transformers")
    batch = random_batch(model, images=2)
    found: list[dict[str, torch.Tensor]] = []
    for fused in (True, False):
        monkeypatch.setattr(spec, "FUSED", fused)
        policy = adapted(folder, targets)
        policy.backward([batch], loss)
        (adapters,) = policy.adapters
        tensors = {
            f"{key} {letter}": gradient_of(pair).clone()
            for key in adapters.names()
            for letter, pair in zip("AB", adapters.pair(key), strict=True)
        }
        found.append(tensors | {n: tensor.clone() for n, tensor in policy.export()})
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        scale = float(expected.abs().max()) + 1e-12
        assert float((ours[key] - expected).abs().max()) / scale < (0.05 if ON_CARD else 1e-4), key


@pytest.mark.parametrize(("recipe", "primary_weights"), [("tensorwise", False), ("blockwise", True)])
def test_adapters_train_beside_fp8_weights_that_stay(
    recipe: str, primary_weights: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spec, "FUSED", True)
    model = wide_vl()
    fp8 = {"recipe": recipe, "primary_weights": primary_weights}
    policy = adapted(save(model, tmp_path / "hf"), ["experts"], dtype="bfloat16", fp8=fp8)
    batch = random_batch(model, images=2)
    adapters = policy.adapters[0]
    pairs = {f"{key} {n}": p for key in adapters.names() for n, p in enumerate(adapters.pair(key))}
    held = [p for p in policy.parameters() if not p.requires_grad]
    before = [p.float().clone() for p in held], {key: p.float().clone() for key, p in pairs.items()}
    losses = [policy.update([batch], loss).loss for _ in range(4)]
    assert losses[-1] < losses[0]
    assert all(torch.equal(p.float(), old) for p, old in zip(held, before[0], strict=True))
    assert not [key for key, p in pairs.items() if torch.equal(p.float(), before[1][key])]
