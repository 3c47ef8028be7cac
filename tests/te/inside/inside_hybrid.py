"""Linear attention among Transformer Engine's layers: its projections are theirs, its rule our own on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_mm.checkpoint.distributed import load_policy, save_policy
from gspo_mm.config import PolicyConfig
from gspo_mm.policy import spec
from gspo_mm.policy.engine import Policy
from gspo_mm.policy.precision import PrecisionError
from tests.te.inside import ON_CARD
from tests.tiny_vl import WIDE, save, tiny_hybrid
from tools.check_parity import compare, random_batch, random_batches

LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 8, "linear_key_head_dim": 32}
FITS: dict[str, Any] = {
    **{key: WIDE[key] for key in ("hidden_size", "moe_intermediate_size", "head_dim")},
    **LINEAR,
    "linear_value_head_dim": 32,
    "shared_expert_intermediate_size": 256,
}


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec, "FUSED", True)


@pytest.fixture(scope="module")
def model() -> Any:
    made = tiny_hybrid(**FITS)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.2)
    return made


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(model, tmp_path_factory.mktemp("hf"), layout="transformers")


def policy(folder: Path, dtype: str = "bfloat16", **settings: Any) -> Policy:
    config = PolicyConfig.model_validate({"dtype": dtype, "optimizer": {"lr": 1e-3}, **settings})
    return Policy.from_hf(str(folder), config, seed=0, total_steps=60)


def losses(trained: Policy, model: Any, updates: int) -> list[float]:
    batch = random_batch(model, images=2)
    return [
        trained.update([batch], lambda _, logprobs_R, __: (logprobs_R.sum() * -1e-2, {})).loss
        for _ in range(updates)
    ]


def test_it_is_transformers_model(tmp_path: Path) -> None:
    model = tiny_hybrid()
    made = policy(save(model, tmp_path / "hf", layout="transformers"), "float32")
    parity = compare(made, model, random_batches(model))
    # on a card Transformer Engine multiplies float32 as TF32
    assert parity.max_abs_logprob < (1e-3 if ON_CARD else 2e-5)
    assert parity.max_rel_grad < (0.05 if ON_CARD else 1e-4), parity.worst_grad
    assert parity.roundtrip_exact


@pytest.mark.parametrize(("recipe", "primary_weights"), [("tensorwise", False), ("blockwise", True)])
def test_fp8_trains_it_and_its_checkpoint_goes_on_under_local_layers(
    recipe: str,
    primary_weights: bool,
    model: Any,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = losses(policy(folder), model, 4)
    first = policy(folder, fp8={"recipe": recipe, "primary_weights": primary_weights})
    before = {name: tensor.float().clone() for name, tensor in first.export()}
    began = losses(first, model, 3)
    after = {name: tensor.float().clone() for name, tensor in first.export()}
    # one number near 1 may move by less than BF16 tells apart
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert not [name for name in still if not name.endswith(("dt_bias", "A_log"))]
    save_policy(first, tmp_path / "c").finish()
    monkeypatch.setattr(spec, "FUSED", False)
    second = policy(folder)
    load_policy(second, tmp_path / "c")
    assert [*began, *losses(second, model, 1)] == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ({"linear_num_value_heads": 2, "linear_value_head_dim": 32}, "linear attention's projection=260"),
        ({"linear_num_value_heads": 8, "linear_value_head_dim": 9}, "linear_value_head_dim=72"),
    ],
)
def test_widths_that_kernels_do_not_take_are_refused(
    text: dict[str, Any], named: str, tmp_path: Path
) -> None:
    folder = save(tiny_hybrid(**{**FITS, **text}), tmp_path, layout="transformers")
    with pytest.raises(PrecisionError, match=rf"{named} is no multiple of 16"):
        policy(folder, fp8={"recipe": "tensorwise"})
