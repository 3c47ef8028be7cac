"""What only a CUDA device can show: Transformer Engine's layers against the CPU path, and FP8. `pytest -m gpu tests/gpu`.

Every test needs a Hopper card or newer and Transformer Engine.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_mm.config import PolicyConfig
from gspo_mm.loss.logprobs import linear_logprobs
from gspo_mm.policy.engine import Policy
from gspo_mm.policy.precision import PrecisionError, check_fp8
from gspo_mm.policy.spec import has_fused_modules
from gspo_mm.types import MicroBatch
from tests.tiny_vl import save, tiny_vl
from tools.check_parity import random_batch, reference_logprobs

pytestmark = pytest.mark.gpu

# widths that FP8 kernels take: multiples of 128
WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "head_dim": 64,
    "num_hidden_layers": 4,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [16, 8, 8],
        "mrope_interleaved": True,
    },
}
RECIPES = ["tensorwise", "delayed", "blockwise"]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_vl(**WIDE)


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(model, tmp_path_factory.mktemp("hf"))


def policy(folder: Path, dtype: str = "bfloat16", **settings: Any) -> Policy:
    config = PolicyConfig.model_validate({"dtype": dtype, "optimizer": {"lr": 1e-3}, **settings})
    return Policy.from_hf(str(folder), config, seed=0, total_steps=60)


def test_transformer_engine_is_what_runs() -> None:
    assert has_fused_modules()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.1)])
def test_fused_layers_give_the_log_probs_of_transformers(
    model: Any, folder: Path, dtype: str, tolerance: float
) -> None:
    batch = random_batch(model, images=3)
    expected = reference_logprobs(model.cpu(), batch).detach()
    (found,) = policy(folder, dtype).logprobs([batch])
    assert (found.cpu() - expected).abs().max() < tolerance
    assert (found.cpu() - expected).abs().mean() < tolerance / 10


def test_fused_layers_give_the_gradients_of_transformers(model: Any, folder: Path) -> None:
    batch = random_batch(model, images=3)
    trained = policy(folder)
    trained.backward([batch], lambda _, lp, __: (lp.sum(), {}))
    found = {name: g.float().cpu() for name, g in trained.export_gradients()}
    model.zero_grad()
    reference_logprobs(model.cpu(), batch).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and float(parameter.grad.norm()) > 1e-3:
            cosine = torch.cosine_similarity(found[name].flatten(), parameter.grad.flatten(), dim=0)
            assert float(cosine) > 0.98, name


def curve(folder: Path, batches: list[MicroBatch], **settings: Any) -> list[float]:
    """Cross-entropy per token over 50 updates."""
    trained = policy(folder, **settings)
    tokens = [b.num_response_tokens for b in batches]
    losses = []
    for step in range(50):
        number = step % len(batches)
        stats = trained.update([batches[number]], lambda _, lp, __, n=number: (-lp.sum() / tokens[n], {}))
        losses.append(stats.loss)
    return losses


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_fp8_recipe_learns_as_bf16_does(recipe: str, model: Any, folder: Path) -> None:
    batches = [random_batch(model, images=2, seed=i) for i in range(5)]
    plain = curve(folder, batches)
    fp8 = curve(folder, batches, fp8={"recipe": recipe})
    assert plain[-1] < plain[0] - 0.5
    for ours, theirs in zip(fp8[10:], plain[10:], strict=True):
        assert ours == pytest.approx(theirs, rel=0.02, abs=0.02)


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_fp8_primary_weights_leave_the_optimizer_the_exact_ones(
    recipe: str, model: Any, folder: Path
) -> None:
    trained = policy(folder, fp8={"recipe": recipe, "primary_weights": True})
    name = "language.decoder.layers.0.self_attention.linear_proj.weight"
    parameter: Any = trained.weights[name]
    expected = model.model.language_model.layers[0].self_attn.o_proj.weight.detach().flatten()
    assert torch.equal(parameter.main_param.cpu().bfloat16(), expected.cpu().bfloat16())


def test_first_and_last_layers_may_stay_in_bf16(model: Any, folder: Path) -> None:
    batch = random_batch(model, images=2)
    some = policy(folder, fp8={"recipe": "tensorwise", "bf16_layers_at_start": 1, "bf16_layers_at_end": 1})
    assert torch.isfinite(some.logprobs([batch])[0]).all()


def test_mxfp8_is_refused_before_blackwell() -> None:
    if torch.cuda.get_device_capability() < (10, 0):
        config = PolicyConfig.model_validate({"fp8": {"recipe": "mxfp8"}})
        with pytest.raises(PrecisionError, match="needs compute capability"):
            check_fp8(config)


def test_chunked_log_probs_on_the_device_equal_full_logits() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(300, 64, device="cuda", generator=generator, dtype=torch.float64)
    weight = torch.randn(1000, 64, device="cuda", generator=generator, dtype=torch.float64)
    targets = torch.randint(1000, (300,), device="cuda", generator=generator)
    found, _ = linear_logprobs(hidden, weight, targets, vocab=1000, chunk_tokens=64)
    expected = (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_gradient(recompute: str, model: Any, folder: Path) -> None:
    batch = random_batch(model, images=3)
    results = []
    for settings in ({}, {"recompute": recompute}):
        trained = policy(folder, **settings)
        trained.backward([batch], lambda _, lp, __: (lp.sum(), {}))
        results.append({name: g.float() for name, g in trained.export_gradients()})
    for name, gradient in results[0].items():
        scale = float(gradient.abs().max()) + 1e-6
        assert float((gradient - results[1][name]).abs().max()) / scale < 0.02, name
