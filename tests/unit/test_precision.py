"""A number format that the machine or another setting cannot do is refused in one sentence, before a model is built."""

import re
from typing import Any

import pytest

from gspo_mm.config import ConfigError, PolicyConfig, parse_config
from gspo_mm.policy import spec
from gspo_mm.policy.precision import (
    PrecisionError,
    check_attention,
    check_fp8,
    check_widths,
    fp8_arguments,
    token_multiple,
)


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


@pytest.mark.parametrize(
    ("key", "value", "plain"), [("offload", True, "false"), ("moments", "bfloat16", "float32")]
)
def test_optimizer_memory_options_need_a_device(key: str, value: Any, plain: str) -> None:
    from gspo_mm.policy.optimizer import _memory_arguments

    config = policy(optimizer={key: value}).optimizer
    with pytest.raises(
        PrecisionError,
        match=rf"policy\.optimizer\.{key}={value} needs CUDA and Transformer Engine.*set policy\.optimizer\.{key}={plain}",
    ):
        _memory_arguments(config)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lora": {"rank": 4, "dropout": 0.1}}, r"policy.lora.dropout=0.1 would make .*; use 0"),
        (
            {"lora": {"rank": 4, "targets": []}},
            "leaves nothing to train; name attention, mlp, experts or projector",
        ),
        (
            {"lora": {"rank": 4}, "freeze": ["vision"]},
            "all weights are frozen beside adapters; take freeze out",
        ),
    ],
)
def test_adapters_that_cannot_be_are_refused(settings: dict[str, Any], said: str) -> None:
    assert re.search(said, refused(**settings))


def test_moments_in_fp8_are_refused_with_the_reason() -> None:
    assert "use bfloat16, or policy.lora" in refused(optimizer={"moments": "fp8"})


def test_freezing_language_and_pipelines_exclude_each_other() -> None:
    assert "nothing to train; use pp=1" in refused(freeze=["language"], parallel={"pp": 2})
    primary = {"recipe": "tensorwise", "primary_weights": True}
    assert "set policy.fp8.primary_weights=false" in refused(freeze=["language"], fp8=primary)


WIDTHS = {"hidden_size": 2048, "ffn_hidden_size": 6144, "moe_ffn_hidden_size": 768, "moe_layer_freq": [1, 1]}
WIDTHS |= {"num_attention_heads": 32, "num_query_groups": 4, "kv_channels": 128}


@pytest.mark.parametrize(
    ("recipe", "change", "tp", "etp", "said"),
    [
        (
            "tensorwise",
            {},
            1,
            64,
            r"_size=768 over policy\.parallel\.etp=64 is 12, .*lower policy\.parallel\.etp",
        ),
        ("mxfp8", {}, 1, 16, r"is 48, which is no multiple of 32, .*lower policy\.parallel\.etp"),
        ("blockwise", {"kv_channels": 8}, 8, 1, r"keys and values=320 over policy\.parallel\.tp=8 is 40"),
        ("tensorwise", {"hidden_size": 2056}, 1, 1, r"hidden_size=2056 is no multiple of 16, .*want it; set"),
        (
            "tensorwise",
            {"ffn_hidden_size": 6152, "moe_layer_freq": [0, 1]},
            1,
            1,
            r"'s intermediate_size=6152 is no",
        ),
    ],
)
def test_a_width_that_the_kernels_do_not_take_is_named_with_what_cuts_it(
    recipe: str, change: dict[str, Any], tp: int, etp: int, said: str
) -> None:
    config = policy(fp8={"recipe": recipe})
    with pytest.raises(PrecisionError, match=said):
        check_widths(config, {**WIDTHS, **change}, tp=tp, etp=etp)


def test_widths_of_layers_that_are_not_there_are_not_looked_at() -> None:
    check_widths(policy(fp8={"recipe": "mxfp8"}), {**WIDTHS, "ffn_hidden_size": 6145}, tp=4, etp=8)
    check_widths(policy(), {**WIDTHS, "hidden_size": 3}, tp=1, etp=1)


def test_attention_over_ranks_is_not_for_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = policy(dtype="float32", parallel={"cp": 2})
    check_attention(asked)  # of local layers, which have it
    monkeypatch.setattr(spec, "FUSED", True)
    with pytest.raises(
        PrecisionError, match=r"float32 with policy\.parallel\.cp=2: .*set policy\.dtype=bfloat16"
    ):
        check_attention(asked)
    check_attention(policy(parallel={"cp": 2}))
    check_attention(policy(dtype="float32"))
