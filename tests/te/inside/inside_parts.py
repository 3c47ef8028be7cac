"""What else a run does to a policy in FP8: looking at the reference, freezing parts, empty work, pushing to FP8 servers."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gspo_mm.batch.packing import pack
from gspo_mm.checkpoint.convert import hf_to_megatron, megatron_to_hf
from gspo_mm.checkpoint.distributed import load_policy, save_policy
from gspo_mm.config import PolicyConfig
from gspo_mm.families.folder import read_hf
from gspo_mm.policy import spec
from gspo_mm.policy.compat import is_quantized
from gspo_mm.policy.engine import Policy
from gspo_mm.policy.reference import Reference
from gspo_mm.sync.quantize import Quantizer
from gspo_mm.types import MicroBatch
from tests.tiny_vl import save, wide_vl
from tools.check_parity import random_batch

FORMATS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "tensorwise": {"recipe": "tensorwise"},
    "blockwise": {"recipe": "blockwise"},
    "tensorwise primary": {"recipe": "tensorwise", "primary_weights": True},
    "blockwise primary": {"recipe": "blockwise", "primary_weights": True},
}
PRIMARY = ["tensorwise primary", "blockwise primary"]


@pytest.fixture(scope="module")
def model() -> Any:
    return wide_vl(vision={"depth": 1, "deepstack_visual_indexes": [0]}, num_hidden_layers=3)


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(model, tmp_path_factory.mktemp("hf"), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def batch(model: Any) -> MicroBatch:
    return random_batch(model, images=2)


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec, "FUSED", True)


def policy(folder: Path, form: str, *, fp8: Any = None, **settings: Any) -> Policy:
    config = PolicyConfig.model_validate(
        {"fp8": {**FORMATS[form], **(fp8 or {})}, "optimizer": {"lr": 4e-3}, **settings}
    )
    return Policy.from_hf(str(folder), config, seed=0, total_steps=60)


def update(trained: Policy, *batches: MicroBatch) -> tuple[float, float]:
    """Loss and gradient norm of a step that makes the batches' responses likelier."""
    stats = trained.update(list(batches), lambda _, logprobs_R, __: (logprobs_R.sum() * -1e-2, {}))
    return stats.loss, stats.grad_norm


def weights(of: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in of.export()}


def unmoved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if torch.equal(before[name], after[name])}


@pytest.mark.parametrize("form", FORMATS)
def test_a_look_at_the_reference_changes_nothing(form: str, folder: Path, batch: MicroBatch) -> None:
    looks, twin = policy(folder, form), policy(folder, form)
    reference, (at_start,) = Reference(looks), looks.logprobs([batch])
    assert update(looks, batch) == update(twin, batch)
    before, (own,) = weights(looks), looks.logprobs([batch])
    for _ in range(3):
        (seen,) = reference.logprobs([batch], 1.0)
        assert torch.equal(seen, at_start)
    assert not torch.equal(own, at_start)
    assert torch.equal(looks.logprobs([batch])[0], own)
    assert len(unmoved(before, weights(looks))) == len(before)
    assert update(looks, batch) == update(twin, batch)


@pytest.mark.parametrize(
    ("part", "form"),
    [
        ("language", "tensorwise"),
        *product(
            ("vision", "projector", "router"), ("tensorwise", "tensorwise primary", "blockwise primary")
        ),
    ],
)
def test_frozen_parts_stay_and_the_rest_moves(part: str, form: str, folder: Path, batch: MicroBatch) -> None:
    trained = policy(folder, form, freeze=[part])
    before = weights(trained)
    for _ in range(2):
        update(trained, batch)
    named = {
        "vision": lambda name: "visual" in name and "merger" not in name,
        "projector": lambda name: "merger" in name,
        "router": lambda name: name.endswith("mlp.gate.weight"),
        "language": lambda name: "visual" not in name,
    }[part]
    assert unmoved(before, weights(trained)) == {name for name in before if named(name)}


@pytest.mark.parametrize("form", ["tensorwise", "blockwise primary"])
def test_layers_at_both_ends_stay_in_bf16(form: str, folder: Path, batch: MicroBatch) -> None:
    some = policy(folder, form, fp8={"bf16_layers_at_start": 1, "bf16_layers_at_end": 1})
    names = [f"language.decoder.layers.{i}.self_attention.linear_proj.weight" for i in range(3)]
    assert [is_quantized(some.weights[name]) for name in names] == [False, "primary" in form, False]
    found = some.logprobs([batch])[0]
    gaps = [float((found - policy(folder, f).logprobs([batch])[0]).abs().mean()) for f in ("bfloat16", form)]
    assert min(gaps) > 0
    before = weights(some)
    for _ in range(2):
        update(some, batch)
    assert not unmoved(before, weights(some))
    all_bf16 = policy(folder, form, fp8={"bf16_layers_at_start": 2, "bf16_layers_at_end": 1})
    assert torch.equal(all_bf16.logprobs([batch])[0], policy(folder, "bfloat16").logprobs([batch])[0])


@pytest.mark.parametrize("form", FORMATS)
def test_an_empty_micro_batch_adds_nothing(form: str, folder: Path, batch: MicroBatch) -> None:
    no_positions: Any = SimpleNamespace(positions=lambda *_: torch.empty(3, 0, dtype=torch.int64))
    nothing = pack([], no_positions)
    with_it, without = policy(folder, form), policy(folder, form)
    logprobs = with_it.logprobs([nothing, batch])
    assert [len(found) for found in logprobs] == [0, batch.num_response_tokens]
    assert torch.equal(logprobs[1], without.logprobs([batch])[0])
    assert update(with_it, nothing, batch, nothing) == update(without, batch)
    after = weights(without)
    assert len(unmoved(after, weights(with_it))) == len(after)
    assert update(with_it, nothing) == (0.0, 0.0)


@pytest.mark.parametrize("form", FORMATS)
def test_experts_without_tokens(form: str, model: Any, batch: MicroBatch, tmp_path: Path) -> None:
    """All tokens go to two of four: the others' weights stay, and nothing becomes NaN."""
    gates = [layer.mlp.gate.weight.data for layer in model.model.language_model.layers]
    kept = [gate.clone() for gate in gates]
    for gate in gates:
        gate.zero_()
    folder = save(model, tmp_path, dtype=torch.bfloat16)
    for gate, before in zip(gates, kept, strict=True):
        gate.copy_(before)
    trained = policy(folder, form, freeze=["router"])
    before = weights(trained)
    assert update(trained, batch)[1] > 0
    for name, after in weights(trained).items():
        assert after.isfinite().all()
        if ".experts." in name:
            moved = [not torch.equal(a, b) for a, b in zip(after, before[name], strict=True)]
            assert sum(moved) == 2


@pytest.mark.parametrize("form", ["bfloat16", "tensorwise", *PRIMARY])
def test_fp8_servers_get_the_bytes_of_the_folders_weights(form: str, folder: Path) -> None:
    """Also with primary weights, up to their own rounding: blocks of 128 x 128 are those of the recipe."""
    trained = policy(folder, form)
    quantizer = Quantizer(trained.family, trained.hf)
    source = read_hf(folder)
    expected = dict(quantizer((name, source.tensor(name)) for name in source.names()))
    found = dict(quantizer(trained.export()))
    assert found.keys() == expected.keys()
    assert sum(tensor.dtype is torch.float8_e4m3fn for tensor in found.values()) == 3 * (4 + 4 * 3)
    for name, tensor in found.items():
        if "primary" not in form:
            assert torch.equal(tensor.view(torch.uint8), expected[name].contiguous().view(torch.uint8)), name
        elif name + "_scale_inv" in found:
            wholes = [_dequantized(of[name], of[name + "_scale_inv"]) for of in (found, expected)]
            assert float((wholes[0] - wholes[1]).norm() / wholes[1].norm()) < 0.05, name


def _dequantized(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    each = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    return values.float() * each[: values.shape[0], : values.shape[1]]


@pytest.mark.parametrize("form", FORMATS)
def test_there_and_back_by_way_of_a_run(
    form: str, folder: Path, batch: MicroBatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Converted by local layers, trained on by Transformer Engine's, converted back: bit-exact but for what was trained."""

    def locally(convert: Any, *args: Any, **kwargs: Any) -> None:
        with monkeypatch.context() as context:
            context.setattr(spec, "FUSED", False)
            convert(*args, check=True, **kwargs)

    locally(hf_to_megatron, folder, tmp_path / "start")
    trained, before = policy(folder, form, freeze=["vision", "router"]), read_hf(folder)
    names = set(before.names())
    frozen = {n for n in names if n.endswith("mlp.gate.weight") or ("visual" in n and "merger" not in n)}
    # what is held in FP8 only is what the model computes with, and that is rounded
    held = re.compile(r"language_model\.layers\..*(_proj\.weight|experts\..*_proj)$")
    rounded = {name for name in names if "primary" in form and held.search(name)}
    for steps, expected in ((0, names - rounded), (1, frozen)):
        load_policy(trained, tmp_path / "start" / "policy")
        for _ in range(steps):
            update(trained, batch)
        save_policy(trained, tmp_path / f"run{steps}" / "policy").finish()
        locally(megatron_to_hf, tmp_path / f"run{steps}", tmp_path / f"hf{steps}", hf=folder)
        after = read_hf(tmp_path / f"hf{steps}")
        assert {n for n in names if torch.equal(before.tensor(n), after.tensor(n))} == expected


@pytest.mark.parametrize("form", ["bfloat16", "tensorwise", *PRIMARY])
def test_a_run_goes_on_by_way_of_local_layers_as_if_it_had_not_stopped(
    form: str, folder: Path, batch: MicroBatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = policy(folder, form)
    update(first, batch)
    save_policy(first, tmp_path / "a").finish()
    with monkeypatch.context() as context:
        context.setattr(spec, "FUSED", False)
        local = policy(folder, "bfloat16")
        load_policy(local, tmp_path / "a")
        save_policy(local, tmp_path / "b").finish()
        step = update(local, batch)
    second = policy(folder, form)
    load_policy(second, tmp_path / "b")
    following = update(first, batch)
    # BF16 holds what whole tensors' scales make of FP8 with a rounding; blocks' scales are powers of two
    exact = form != "tensorwise primary"
    assert update(second, batch) == pytest.approx(following, rel=0 if exact else 0.01, abs=0)
    assert step == pytest.approx(following, rel=0.02 if form == "bfloat16" else 0.1)
