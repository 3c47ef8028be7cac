"""Sinks and windows among Transformer Engine's layers, and experts with biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_mm.checkpoint.distributed import load_policy, save_policy
from gspo_mm.config import PolicyConfig
from gspo_mm.policy import spec
from gspo_mm.policy.engine import Policy
from tests.te.inside import ON_CARD
from tests.tiny_vl import save, tiny_sinks
from tools.check_parity import compare, random_batch, random_batches

# widths that FP8 kernels take
WIDE = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec, "FUSED", True)


def policy(folder: Path, dtype: str = "bfloat16", **settings: Any) -> Policy:
    config = PolicyConfig.model_validate({"dtype": dtype, "optimizer": {"lr": 1e-3}, **settings})
    return Policy.from_hf(str(folder), config, seed=0, total_steps=60)


@pytest.mark.parametrize("in_one_kernel", [True, False])
def test_it_is_transformers_model(in_one_kernel: bool, tmp_path: Path) -> None:
    model = tiny_sinks()
    folder = save(model, tmp_path / "hf")
    wanted = {} if in_one_kernel else {"bias_activation_fusion": False}
    made = policy(folder, "float32", megatron=wanted)
    assert made.chunks[0].config.bias_activation_fusion is in_one_kernel
    parity = compare(made, model, random_batches(model))
    # on a card Transformer Engine multiplies float32 as TF32
    assert parity.max_abs_logprob < (1e-3 if ON_CARD else 2e-5)
    assert parity.max_rel_grad < (0.05 if ON_CARD else 1e-4), parity.worst_grad
    assert parity.roundtrip_exact


def losses(trained: Policy, model: Any, updates: int) -> list[float]:
    batch = random_batch(model)
    return [
        trained.update([batch], lambda _, logprobs_R, __: (logprobs_R.sum() * -1e-2, {})).loss
        for _ in range(updates)
    ]


@pytest.mark.parametrize("settings", [{}, {"fp8": {"recipe": "blockwise"}}], ids=["bfloat16", "fp8"])
def test_its_checkpoint_goes_on_under_local_layers(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_sinks(**WIDE)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.2)
    folder = save(model, tmp_path / "hf")
    expected = losses(policy(folder), model, 4)
    first = policy(folder, **settings)
    before = {name: tensor.float().clone() for name, tensor in first.export()}
    began = losses(first, model, 3)
    after = {name: tensor.float().clone() for name, tensor in first.export()}
    assert not [name for name in before if torch.equal(before[name], after[name])]
    save_policy(first, tmp_path / "c").finish()
    monkeypatch.setattr(spec, "FUSED", False)
    second = policy(folder)
    load_policy(second, tmp_path / "c")
    assert [*began, *losses(second, model, 1)] == pytest.approx(expected, rel=0.05)
