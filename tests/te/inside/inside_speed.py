"""What is on by default for speed (`gspo_mm/policy/speed.py`) changes no number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_mm.config import PolicyConfig
from gspo_mm.policy import model as model_module
from gspo_mm.policy import spec
from gspo_mm.policy.engine import Policy
from gspo_mm.types import MicroBatch
from tests.tiny_vl import save, wide_vl
from tools.check_parity import compare, random_batch, random_batches

DELAYED = "overlap_dispatch_backward_with_experts_wgrad"
# what a single rank, or one without CUDA, has off; and what has its defaults turned off
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "routing in one kernel": {"megatron": {"moe_router_fusion": True}},
    "experts' weight gradients later": {"megatron": {DELAYED: True}},
    "and sent as soon as they are there": {"megatron": {DELAYED: True}, "optimizer": {"overlap": True}},
    "activation in three passes": {"megatron": {"bias_activation_fusion": False}},
    "selective recomputation": {"recompute": "selective"},
}


@pytest.fixture(scope="module")
def model() -> Any:
    return wide_vl()


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(model, tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def batches(model: Any) -> list[MicroBatch]:
    """Two: the second one's weight gradients are added to the first's."""
    return [random_batch(model, images=2), random_batch(model, images=1)]


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec, "FUSED", True)


def policy(folder: Path, dtype: str = "float32", **settings: Any) -> Policy:
    optimizer = {"lr": 1e-3, **settings.pop("optimizer", {})}
    config = PolicyConfig.model_validate({"dtype": dtype, "optimizer": optimizer, **settings})
    return Policy.from_hf(str(folder), config, seed=0, total_steps=60)


def gradients(made: Policy, batches: list[MicroBatch]) -> dict[str, torch.Tensor]:
    made.backward(batches, lambda _, logprobs_R, __: (logprobs_R.sum(), {}))
    return {name: gradient.float().clone() for name, gradient in made.export_gradients()}


@pytest.fixture(scope="module")
def expected(folder: Path, batches: list[MicroBatch]) -> dict[str, torch.Tensor]:
    """Of the layers without Transformer Engine."""
    return gradients(policy(folder), batches)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_transformers(case: str, model: Any, folder: Path) -> None:
    parity = compare(policy(folder, **CASES[case]), model, random_batches(model))
    assert parity.max_abs_logprob < 2e-5
    assert parity.max_rel_grad < 1e-4, parity.worst_grad


def test_weight_gradients_are_added_up_in_float32_inside_the_product(
    folder: Path,
    batches: list[MicroBatch],
    expected: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def error(name: str, found: dict[str, torch.Tensor]) -> float:
        return float((found[name] - expected[name]).norm() / expected[name].norm())

    fused = gradients(policy(folder, "bfloat16"), batches)
    monkeypatch.setattr(model_module, "fuse_weight_gradients", lambda _: None)
    apart = gradients(policy(folder, "bfloat16"), batches)
    name = "model.language_model.layers.0.self_attn.o_proj.weight"
    assert not torch.equal(fused[name], fused[name].bfloat16().float())  # no sum of BF16 numbers
    assert not torch.equal(fused[name], apart[name])
    assert error(name, fused) == pytest.approx(error(name, apart), rel=0.2)
