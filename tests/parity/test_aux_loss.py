"""The balancing loss of `policy.moe.aux_loss` against transformers' own, its weight over micro-batches, and padding."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func

from gspo_mm.config import PolicyConfig
from gspo_mm.config.layout import PlanError
from gspo_mm.policy.engine import Policy
from tools.check_parity import random_batch, reference_logprobs

WEIGHT = 0.03


def policy(folder: Path, aux_loss: float, **changes: Any) -> Policy:
    config = PolicyConfig.model_validate({"dtype": "float32", "moe": {"aux_loss": aux_loss}, **changes})
    return Policy.from_hf(str(folder), config, seed=0, total_steps=2)


def reference(model: Any, batches: list[Any]) -> dict[str, torch.Tensor]:
    """Gradients of mean log-prob plus, per layer, transformers' balancing loss as a mean over tokens."""
    model.zero_grad()
    logits: list[torch.Tensor] = []
    text = model.config.text_config
    hooks = [
        module.register_forward_hook(
            lambda _, inputs, output, m=module: logits.append(inputs[0] @ m.weight.T)
        )
        for name, module in model.named_modules()
        if name.endswith("mlp.gate")
    ]
    total = sum(batch.num_tokens for batch in batches)
    loss = torch.zeros(())
    for batch in batches:
        logits.clear()
        loss = loss - reference_logprobs(model, batch).mean()
        per_layer = [torch.cat(logits[n :: text.num_hidden_layers]) for n in range(text.num_hidden_layers)]
        for layer in per_layer:
            assert len(layer) == batch.num_tokens
            # transformers sums over the k choices; the Switch paper's loss, which is 1 when even, divides by k
            even = load_balancing_loss_func((layer,), text.num_experts, text.num_experts_per_tok)
            loss = loss + WEIGHT * even / text.num_experts_per_tok * batch.num_tokens / total
    loss.backward()
    for hook in hooks:
        hook.remove()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def mean_logprob(_: int, logprobs_R: torch.Tensor, __: torch.Tensor) -> Any:
    return -logprobs_R.mean(), {}


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_gradients_are_those_of_transformers_balancing_loss(model: Any, folder: Path, recompute: str) -> None:
    batches = [
        random_batch(model, seed=1),
        random_batch(model, seed=2, images=0),
        random_batch(model, seed=3),
    ]
    assert len({batch.num_tokens for batch in batches}) > 1, "the weight by tokens must matter"
    ours = policy(folder, WEIGHT, recompute=recompute)
    ours.backward(batches, mean_logprob)
    expected = reference(model, batches)
    for name, gradient in ours.export_gradients():
        scale = float(expected[name].abs().max())
        assert float((gradient - expected[name]).abs().max()) <= 1e-4 * scale + 1e-9, name


def test_the_loss_is_off_by_default_and_changes_the_routers_gradient(model: Any, folder: Path) -> None:
    batches = [random_batch(model, seed=1)]

    def routers(aux_loss: float) -> list[torch.Tensor]:
        ours = policy(folder, aux_loss)
        loss, _ = ours.backward(batches, mean_logprob)
        assert loss == pytest.approx(-reference_logprobs(model, batches[0]).mean().item(), abs=1e-5)
        return [g.clone() for name, g in ours.export_gradients() if name.endswith("gate.weight")]

    assert PolicyConfig().moe.aux_loss == 0
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(routers(0.0), routers(1.0), strict=True))


def test_a_dispatcher_that_is_not_installed_is_named(folder: Path) -> None:
    with pytest.raises(PlanError, match=r"dispatcher=flex needs GPUs and DeepEP.*alltoall"):
        policy(folder, 0.0, moe={"dispatcher": "flex"})
