"""The policy on Transformer Engine's layers computes transformers' model, trains all of it in FP8, and goes on anywhere."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformer_engine.pytorch as te  # pyright: ignore[reportMissingImports]
from megatron.core.transformer.moe.moe_utils import pad_routing_map
from transformer_engine.common.recipe import Float8CurrentScaling  # pyright: ignore[reportMissingImports]

from gspo_mm.checkpoint.distributed import load_policy, save_policy
from gspo_mm.config import ParallelConfig, PolicyConfig
from gspo_mm.policy import spec
from gspo_mm.policy.engine import Policy
from gspo_mm.policy.layout import padded_tokens
from gspo_mm.policy.parallel import ParallelPlan
from gspo_mm.policy.precision import token_multiple
from gspo_mm.types import MicroBatch
from tests.te.inside import DEVICE, ON_CARD, same
from tests.tiny_vl import save, wide_vl
from tools.check_parity import compare, random_batch, random_batches

RECIPES = ["tensorwise", "blockwise"]


@pytest.fixture(scope="module", params=[True, False], ids=["mixture", "dense"])
def model(request: pytest.FixtureRequest) -> Any:
    return wide_vl(moe=request.param)


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(model, tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def batch(model: Any) -> MicroBatch:
    return random_batch(model, images=2)


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec, "FUSED", True)


def policy(folder: Path, dtype: str = "bfloat16", **settings: Any) -> Policy:
    config = PolicyConfig.model_validate({"dtype": dtype, "optimizer": {"lr": 1e-3}, **settings})
    return Policy.from_hf(str(folder), config, seed=0, total_steps=60)


def losses(trained: Policy, batch: MicroBatch, updates: int) -> list[float]:
    """Of updates that make the batch's responses likelier."""

    def loss(_: int, logprobs_R: torch.Tensor, __: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        return logprobs_R.sum() * -1e-2, {}

    return [trained.update([batch], loss).loss for _ in range(updates)]


def weights(of: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.float().clone() for name, tensor in of.export()}


def test_it_is_transformers_model(model: Any, folder: Path) -> None:
    made = policy(folder, "float32")
    layers = {type(module).__module__ for module in made.chunks[0].modules()}
    assert "megatron.core.extensions.transformer_engine" in layers
    parity = compare(made, model, random_batches(model))
    # on a card Transformer Engine multiplies float32 as TF32
    assert parity.max_abs_logprob < (1e-3 if ON_CARD else 2e-5)
    assert parity.max_rel_grad < (0.05 if ON_CARD else 1e-4), parity.worst_grad
    assert parity.roundtrip_exact


@pytest.mark.parametrize("primary_weights", [False, True], ids=["beside", "primary"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_trains_every_tensor_and_goes_on_from_a_checkpoint(
    recipe: str, primary_weights: bool, folder: Path, batch: MicroBatch, tmp_path: Path
) -> None:
    fp8 = {"recipe": recipe, "primary_weights": primary_weights}
    expected = losses(policy(folder), batch, 5)
    first = policy(folder, fp8=fp8)
    held = sum("Float8" in type(parameter).__name__ for parameter in first.parameters())
    assert (held > 0) == primary_weights
    before = weights(first)
    began = losses(first, batch, 3)
    after = weights(first)
    assert not [name for name in before if torch.equal(before[name], after[name])]
    save_policy(first, tmp_path / "c").finish()
    rest = losses(first, batch, 2)
    assert [*began, *rest] == pytest.approx(expected, rel=0.05)
    second = policy(folder, fp8=fp8)
    load_policy(second, tmp_path / "c")
    found = weights(second)
    assert all(torch.equal(after[name], found[name]) for name in after)
    assert losses(second, batch, 2) == pytest.approx(rest, rel=1e-3 if ON_CARD else 0.0)


@pytest.mark.parametrize("written", [True, False], ids=["from te", "from local"])
@pytest.mark.parametrize("read", [True, False], ids=["to te", "to local"])
def test_checkpoints_cross_between_transformer_engines_layers_and_local_ones(
    written: bool,
    read: bool,
    folder: Path,
    batch: MicroBatch,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spec, "FUSED", written)
    first = policy(folder)
    losses(first, batch, 2)
    save_policy(first, tmp_path / "c").finish()
    before, rest = weights(first), losses(first, batch, 2)
    monkeypatch.setattr(spec, "FUSED", read)
    second = policy(folder)
    load_policy(second, tmp_path / "c")
    found = weights(second)
    assert all(torch.equal(before[name], found[name]) for name in before)
    assert losses(second, batch, 2) == pytest.approx(rest, rel=2e-2)


@pytest.mark.parametrize("recipe", [None, *RECIPES])
@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_changes_no_gradient(
    recompute: str, recipe: str | None, folder: Path, batch: MicroBatch
) -> None:
    def gradients(**settings: Any) -> dict[str, torch.Tensor]:
        made = policy(folder, fp8={"recipe": recipe}, **settings)
        made.backward([batch], lambda _, logprobs_R, __: (logprobs_R.sum(), {}))
        return {name: gradient.float().clone() for name, gradient in made.export_gradients()}

    plain, again = gradients(), gradients(recompute=recompute)
    assert all(same(plain[name], again[name]) for name in plain)


def test_moments_in_bf16_beside_fp8_primary_weights(folder: Path, batch: MicroBatch) -> None:
    made = policy(
        folder,
        fp8={"recipe": "tensorwise", "primary_weights": True},
        optimizer={"lr": 1e-3, "moments": "bfloat16"},
    )
    before = weights(made)
    assert losses(made, batch, 3) == pytest.approx(losses(policy(folder), batch, 3), rel=0.05)
    after = weights(made)
    assert not [name for name in before if torch.equal(before[name], after[name])]


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("lengths", [[100, 37], []], ids=["two sequences", "none"])
def test_each_rank_has_rows_that_the_kernels_take(tp: int, lengths: list[int]) -> None:
    """Also where all rows choose the same experts, as rows of padding do."""
    plan = ParallelPlan.from_config(ParallelConfig(tp=tp), tp)
    config = PolicyConfig.model_validate({"fp8": {"recipe": "tensorwise"}})
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    total = padded_tokens(SimpleNamespace(cu_seqlens=offsets), plan, multiple=token_multiple(config))  # pyright: ignore[reportArgumentType]
    rows = total // tp
    layer = te.LayerNormLinear(
        256, 256, bias=False, params_dtype=torch.bfloat16, device=DEVICE, normalization="RMSNorm"
    )
    with te.fp8_autocast(enabled=True, fp8_recipe=Float8CurrentScaling()):
        assert layer(torch.randn(rows, 256, dtype=torch.bfloat16, device=DEVICE)).shape == (rows, 256)
    chosen = torch.zeros(rows, 8, dtype=torch.bool)
    chosen[:, :2] = True
    assert all(count % 16 == 0 for count in pad_routing_map(chosen, 16).sum(0).tolist())
