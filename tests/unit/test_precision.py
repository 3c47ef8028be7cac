"""A number format that the machine or another setting cannot do is refused in one sentence, before a model is built."""

from typing import Any

import pytest

from gspo_mm.config import ConfigError, PolicyConfig, parse_config
from gspo_mm.policy.precision import PrecisionError, check_fp8, fp8_arguments, token_multiple


def policy(**values: Any) -> PolicyConfig:
    return PolicyConfig.model_validate(values)


def refused(**values: Any) -> str:
    sections: dict[str, Any] = {
        "run": {"name": "a"},
        "model": {"path": "m"},
        "data": {"train": ["a.tar"]},
        "reward": {"file": "r.yaml"},
    }
    with pytest.raises(ConfigError) as caught:
        parse_config({**sections, "policy": values})
    return str(caught.value)


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
def test_fp8_without_a_device_is_one_sentence(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(
        PrecisionError, match=rf"policy\.fp8\.recipe={recipe} needs a CUDA device.*recipe=null"
    ):
        check_fp8(policy(fp8={"recipe": recipe}))
    check_fp8(policy())


def test_a_device_that_is_too_old_is_named_with_what_it_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    with pytest.raises(
        PrecisionError, match=r"mxfp8 needs compute capability 10\.0 but NVIDIA H200 has 9\.0; use block"
    ):
        check_fp8(policy(fp8={"recipe": "mxfp8"}))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 0))
    with pytest.raises(PrecisionError, match=r"tensorwise needs compute capability 8\.9.*recipe=null"):
        check_fp8(policy(fp8={"recipe": "tensorwise"}))


def test_settings_that_fp8_contradicts_are_refused_at_load() -> None:
    assert "set policy.dtype=bfloat16" in refused(dtype="float32", fp8={"recipe": "tensorwise"})
    assert "could not be continued; use tensorwise" in refused(fp8={"recipe": "delayed"})
    assert "needs policy.fp8.recipe" in refused(fp8={"primary_weights": True})


def test_rows_are_padded_to_what_the_kernels_take() -> None:
    assert token_multiple(policy()) == 1
    assert token_multiple(policy(fp8={"recipe": "blockwise"})) == 16
    assert token_multiple(policy(fp8={"recipe": "mxfp8"})) == 32


def test_a_recipe_becomes_megatrons_arguments() -> None:
    assert fp8_arguments(policy()) == {}
    found = fp8_arguments(
        policy(fp8={"recipe": "tensorwise", "bf16_layers_at_start": 2, "primary_weights": True})
    )
    assert found["fp8"] == "hybrid"
    assert found["fp8_recipe"] == "tensorwise"
    assert found["fp8_param"] is True
    assert found["first_last_layers_bf16"] is True
    assert (found["num_layers_at_start_in_bf16"], found["num_layers_at_end_in_bf16"]) == (2, 0)
    assert fp8_arguments(policy(fp8={"recipe": "blockwise"}))["fp8"] == "e4m3"


@pytest.mark.parametrize("key", ["offload", "precision_aware"])
def test_optimizer_memory_options_need_a_device(key: str) -> None:
    from gspo_mm.policy.optimizer import _memory_arguments

    config = policy(optimizer={key: True}).optimizer
    with pytest.raises(
        PrecisionError, match=rf"policy\.optimizer\.{key}=true needs CUDA and Transformer Engine"
    ):
        _memory_arguments(config)


def test_freezing_language_and_pipelines_exclude_each_other() -> None:
    assert "nothing to train; use pp=1" in refused(freeze=["language"], parallel={"pp": 2})
