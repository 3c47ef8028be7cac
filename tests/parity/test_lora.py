"""Adapters are peft's on transformers' model: log-probs, every gradient, merged weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.layer import ParamWrapper

from gspo_mm.checkpoint.convert import megatron_to_hf
from gspo_mm.checkpoint.distributed import load_policy, save_policy
from gspo_mm.checkpoint.export import export_adapters
from gspo_mm.config import ModelConfig, PolicyConfig
from gspo_mm.config.layout import PlanError
from gspo_mm.families.folder import read_hf
from gspo_mm.policy.engine import Policy
from gspo_mm.policy.weights import gradient_of
from tests.tiny_vl import save, tiny_glm, tiny_hybrid, tiny_sinks, tiny_text, tiny_vl, tiny_windows
from tools.check_parity import positions_model, random_batch, reference_logprobs

RANK, ALPHA = 3, 6.0

MODELS: dict[str, Any] = {
    "a mixture with a dense layer": (lambda: tiny_vl(mlp_only_layers=[1]), ["mlp", "experts", "projector"]),
    "dense, attention biases, tied": (
        lambda: tiny_vl(moe=False, attention_bias=True, tied=True),
        ["mlp", "projector"],
    ),
    "text alone": (lambda: tiny_text(norm_topk_prob=False), ["experts"]),
    "linear attention, a shared expert": (tiny_hybrid, ["mlp", "experts"]),
    "windows in the tower": (tiny_windows, ["mlp", "projector"]),
    "sigmoid, a convolution in the projector": (tiny_glm, ["mlp", "experts", "projector"]),
    "sinks": (tiny_sinks, []),
}


def adapted(folder: Path, targets: list[str], **settings: Any) -> Policy:
    lora = {"rank": RANK, "alpha": ALPHA, "targets": targets}
    config = PolicyConfig.model_validate({"dtype": "float32", "lora": lora, **settings})
    return Policy.from_hf(str(folder), config, seed=0, total_steps=10)


@torch.no_grad()
def set_pairs(policy: Policy) -> None:
    """Both of every pair to something else than they begin as: with B = 0 nothing reaches A."""
    for adapters in policy.adapters:
        for number, key in enumerate(sorted(adapters.names())):
            generator = torch.Generator().manual_seed(number)
            for pair in adapters.pair(key):
                pair.copy_(0.1 * torch.randn(pair.shape, generator=generator))
    policy.optimizer.take_over_parameters()


def in_peft(model: Any, keys: list[str]) -> Any:
    modules = sorted({key.removesuffix(".weight") for key in keys if key.endswith(".weight")})
    stacks = sorted({key.rpartition(".")[0] for key in keys if not key.endswith(".weight")})
    config = peft.LoraConfig(
        r=RANK, lora_alpha=int(ALPHA), target_modules=modules, target_parameters=stacks, lora_dropout=0.0
    )
    model = copy.deepcopy(model)
    # for some types peft takes any module that is called as published experts are for one of them, and leaves it out
    kind, model.config.model_type = model.config.model_type, "none"
    wrapped = peft.get_peft_model(model, config)
    model.config.model_type = kind
    return wrapped


def pairs_of(wrapped: Any) -> Iterator[tuple[str, Any, Any]]:
    """(our key, A, B) of every adapter of peft's: views, those of a stack of experts one by one; of gradients as well."""
    for name, module in wrapped.named_modules():
        if not hasattr(module, "lora_A") or not len(module.lora_A):
            continue
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if not isinstance(module, ParamWrapper):
            yield f"{name}.weight", (a, lambda t: t), (b, lambda t: t)
            continue
        count = module.num_experts
        for e in range(count):
            yield (
                f"{name}.{module.parameter_name}.{e}",
                (a, lambda t, e=e: t.reshape(count, -1, t.shape[-1])[e]),  # noqa: B023
                (b, lambda t, e=e: t.reshape(len(t), -1, count)[:, :, e]),  # noqa: B023
            )


@pytest.mark.parametrize("name", MODELS)
def test_log_probs_gradients_and_merged_weights_are_pefts(name: str, tmp_path: Path) -> None:
    make, targets = MODELS[name]
    model = make()
    sees = hasattr(model.config, "vision_config")
    policy = adapted(save(model, tmp_path / "hf", layout="transformers"), ["attention", *targets])
    set_pairs(policy)
    (adapters,) = policy.adapters
    wrapped = in_peft(model, adapters.names())
    theirs = {key: (a, b) for key, a, b in pairs_of(wrapped)}
    assert theirs.keys() == set(adapters.names())
    with torch.no_grad():
        for key, pairs in theirs.items():
            for (parameter, part), own in zip(pairs, adapters.pair(key), strict=True):
                part(parameter.data).copy_(own)
    batch = random_batch(model, images=3 if sees else 0)
    weights = torch.randn(batch.num_response_tokens, generator=torch.Generator().manual_seed(0))
    ours: list[torch.Tensor] = []

    def loss(_: int, logprobs_R: torch.Tensor, __: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        ours.append(logprobs_R.detach())
        return (logprobs_R * weights).sum(), {}

    policy.backward([batch], loss)
    expected = reference_logprobs(wrapped.base_model.model, batch)
    (expected * weights).sum().backward()
    assert (ours[0] - expected).abs().max() < 2e-5
    largest = max(
        float(p.grad.abs().max()) for _, pairs in theirs.items() for p, _ in pairs if p.grad is not None
    )
    for key, pairs in theirs.items():
        for (parameter, part), own in zip(pairs, adapters.pair(key), strict=True):
            found, wanted = gradient_of(own), part(parameter.grad)
            scale = max(float(wanted.abs().max()), 1e-4 * largest)
            assert float((found - wanted).abs().max()) / scale < 1e-4, key
    merged = wrapped.merge_and_unload().state_dict()
    for tensor_name, tensor in policy.export():
        torch.testing.assert_close(tensor, merged[tensor_name], rtol=1e-5, atol=1e-6)


def test_adapters_begin_as_the_model_itself_and_are_all_that_is_trained(tmp_path: Path) -> None:
    model = tiny_vl()
    policy = adapted(save(model, tmp_path / "hf"), ["attention"])
    batch = random_batch(model, images=2)
    assert (policy.logprobs([batch])[0] - reference_logprobs(model, batch)).abs().max() < 2e-5
    trained = {name for name, p in policy.chunks[0].named_parameters() if p.requires_grad}
    assert trained
    assert all(name.startswith("adapters.") for name in trained)
    before = {name: tensor.clone() for name, tensor in policy.export()}
    for _ in range(2):
        policy.update([batch], lambda _, logprobs_R, __: (-logprobs_R.sum(), {}))
    moved = {name for name, tensor in policy.export() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if "self_attn" in name and name.endswith("_proj.weight")}


def test_without_them_the_policy_is_the_reference(tmp_path: Path) -> None:
    model = tiny_vl()
    policy = adapted(save(model, tmp_path / "hf"), ["attention", "experts", "projector"])
    batch = random_batch(model, images=2)
    set_pairs(policy)
    from gspo_mm.policy.reference import Reference

    (plain,) = Reference(policy).logprobs([batch], 1.0)
    assert (plain - reference_logprobs(model, batch)).abs().max() < 2e-5
    assert (policy.logprobs([batch])[0] - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_the_folder_that_is_written_is_read_by_peft(name: str, tmp_path: Path) -> None:
    make, targets = MODELS[name]
    model = make()
    folder = save(model, tmp_path / "hf", layout="transformers")
    if name.startswith("sigmoid"):
        targets = ["experts"]  # peft takes adapters of GLM's other MLPs for those of experts, and fails
    policy = adapted(folder, ["attention", *targets])
    set_pairs(policy)
    export_adapters(policy, tmp_path / "adapter", ModelConfig(path=str(folder)))
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "adapter"))
    merged = wrapped.merge_and_unload().state_dict()
    for name, tensor in policy.export():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "target"), [({"moe": False}, "experts"), ({}, "mlp")], ids=["no experts", "no dense MLP"]
)
def test_targets_that_a_model_has_not_are_refused(text: dict[str, Any], target: str, tmp_path: Path) -> None:
    folder = save(tiny_vl(**text), tmp_path / "hf")
    with pytest.raises(PlanError, match=rf"policy\.lora\.targets names {target}, .* take it off the list"):
        adapted(folder, ["attention", target])


def test_a_checkpoint_is_continued_and_converted_with_its_adapters(tmp_path: Path) -> None:
    folder = save(tiny_vl(), tmp_path / "hf")
    targets = ["attention", "experts"]
    first = adapted(folder, targets)
    batch = random_batch(positions_model(first.hf), images=2)

    def train(policy: Policy, updates: int) -> list[float]:
        loss: Any = lambda _, logprobs_R, __: (-logprobs_R.sum(), {})
        return [policy.update([batch], loss).loss for _ in range(updates)]

    train(first, 2)
    save_policy(first, tmp_path / "checkpoint" / "policy").finish()
    merged = {name: tensor.clone() for name, tensor in first.export()}
    expected = train(first, 2)
    second = adapted(folder, targets)
    load_policy(second, tmp_path / "checkpoint" / "policy")
    assert train(second, 2) == expected
    megatron_to_hf(tmp_path / "checkpoint", tmp_path / "out", hf=folder, check=True)
    converted = dict(read_hf(tmp_path / "out"))
    assert all(torch.equal(converted[name], tensor) for name, tensor in merged.items())
