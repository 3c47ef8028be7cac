"""Servers in FP8: which layers, the folder they start from, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_mm.config import ConfigError
from gspo_mm.families.folder import read_hf
from gspo_mm.families.table import family_of
from gspo_mm.families.write import write_hf
from gspo_mm.rollout.embedded import EmbeddedOpening
from gspo_mm.runtime.preempt import StopRequest
from gspo_mm.serving.launch import server_options
from gspo_mm.serving.served import (
    SCALE,
    BlockSizeError,
    check_blocks,
    check_served,
    quantized_names,
    served,
    served_template,
    tensor_names,
    weight_map,
)
from gspo_mm.serving.server import Server
from gspo_mm.sync.quantize import FP8
from gspo_mm.types import GspoError
from tests.unit.test_quantize import LAYER, WIDE, apart, config, make, make_wide, quantizer


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wide(tmp_path_factory.mktemp("wide") / "model")


def expected(layers: dict[int, bool], experts: int) -> set[str]:
    names = set()
    for number, is_moe in layers.items():
        names |= {f"{LAYER}.{number}.self_attn.{x}_proj.weight" for x in "qkvo"}
        of = [f"experts.{e}." for e in range(experts)] if is_moe else [""]
        names |= {f"{LAYER}.{number}.mlp.{e}{x}_proj.weight" for e in of for x in ("gate", "up", "down")}
    return names


def test_exactly_the_decoders_projections_are_quantized(wide: Path) -> None:
    family = family_of(wide)
    hf = family.load_config(str(wide))
    wanted = expected({0: True, 1: False, 2: True}, experts=4)
    assert quantized_names(family, hf) == wanted
    kept = set(tensor_names(weight_map(family, hf))) - wanted
    assert wanted <= set(tensor_names(weight_map(family, hf))), "names that the weight map does not know"
    visual = {name for name in read_hf(wide).names() if name.startswith("model.visual.")}
    norms = {
        f"{LAYER}.{n}.{x}.weight"
        for n in range(3)
        for x in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
    }
    routers = {f"{LAYER}.{n}.mlp.gate.weight" for n in (0, 2)}
    head = {"lm_head.weight", "model.language_model.embed_tokens.weight", "model.language_model.norm.weight"}
    assert kept == visual | norms | routers | head


def test_the_dense_family_has_its_mlp_quantized(tmp_path: Path) -> None:
    path = make(tmp_path / "dense", *WIDE[:2], family="qwen3_vl")
    family = family_of(path)
    assert quantized_names(family, family.load_config(str(path))) == expected(
        dict.fromkeys(range(3), False), 0
    )


# what servers start from


def test_servers_start_from_a_folder_that_says_fp8_and_has_no_weights(wide: Path, tmp_path: Path) -> None:
    settings = config(wide, tmp_path)
    path = Path(served(settings).model.path)
    assert path.parent == tmp_path / "fp8" / "servers"
    assert not list(path.glob("*.safetensors*"))
    assert (path / "tokenizer.json").read_bytes() == (wide / "tokenizer.json").read_bytes()
    told, original = (json.loads((p / "config.json").read_text()) for p in (path, wide))
    quantization = told.pop("quantization_config")
    assert told == original
    assert quantization.pop("modules_to_not_convert") == sorted(
        {name.rpartition(".")[0] for name in read_hf(wide).names() if not name.rpartition(".")[0].endswith((".experts", "_proj"))}
    )  # fmt: skip
    assert quantization == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    assert served(settings).model.path == str(path), "the same one again"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    other = config(wide, tmp_path, rollout={"sglang": {}})
    assert served(other) is other


def test_only_servers_of_such_a_run_start_with_random_weights(wide: Path, tmp_path: Path) -> None:
    here = Server(name="a", generation="b", state="up", url="http://127.0.0.1:1")
    options = [
        server_options(served(config(wide, tmp_path, rollout={"sglang": {"fp8": fp8}})), here, on_gpus=False)
        for fp8 in (True, False)
    ]
    assert [o.get("load-format") for o in options] == ["dummy", None]


def test_a_written_folder_holds_the_model_in_fp8(wide: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    original = dict(apart(iter(read_hf(wide))))
    path = write_hf(
        tmp_path / "out",
        served_template(config(wide, tmp_path)),
        quantizer(wide)(read_hf(wide)),
        durable=False,
    )
    written = load_file(path / "model.safetensors")
    assert json.loads((path / "config.json").read_text())["quantization_config"]["quant_method"] == "fp8"
    for name, tensor in original.items():
        if name + SCALE in written:
            assert (written.pop(name).dtype, scales := written.pop(name + SCALE)) == (FP8, scales)
        else:
            assert torch.equal(written.pop(name), tensor.bfloat16())
    assert not written


# refusals


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        (
            {"rollout": {"engine": "embedded"}},
            r"rollout\.sglang\.fp8=true with rollout\.engine=embedded: .*set rollout\.engine=sglang, or",
        ),
        (
            {"rollout": {"engine": "sglang", "sglang": {"fp8": True, "colocate": True}}},
            r"rollout\.sglang\.fp8=true with rollout\.sglang\.colocate=true: .*set one of them to false",
        ),
        (
            {"policy": {"dtype": "float32"}},
            r"rollout\.sglang\.fp8=true with policy\.dtype=float32: .*set policy\.dtype=bfloat16, or",
        ),
        (
            {"rollout": {"sglang": {"fp8": True, "extra_args": {"quantization": "fp8"}}}},
            r"extra_args\.quantization=fp8 contradicts rollout\.sglang\.fp8=true, .*leave it out, or",
        ),
    ],
)
def test_what_contradicts_fp8_servers_is_one_sentence(
    wide: Path, sections: dict[str, dict[str, Any]], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence) as refusal:
        config(wide, **sections)
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({}, None),
        (
            {"tp": 3, "ep": 3},
            r"num_attention_heads\*head_dim=256 of .* over 3 GPUs .*; lower rollout\.sglang\.tp, or",
        ),
        (
            {"tp": 2, "ep": 2},
            r"num_key_value_heads\*head_dim=128 .* over 2 GPUs .*; lower rollout\.sglang\.tp, or",
        ),
        (
            {"tp": 2, "ep": 1, "dp": 2},
            r"moe_intermediate_size=384 .* over 2 GPUs .*; raise rollout\.sglang\.ep, or",
        ),
        ({"tp": 2, "ep": 2, "dp": 2}, None),
    ],
)
def test_dims_that_a_server_cannot_cut_into_blocks_are_one_sentence(
    wide: Path, sizes: dict[str, int], sentence: str | None
) -> None:
    settings = config(wide, rollout={"sglang": {"fp8": True, **sizes}})
    if sentence is None:
        check_blocks(settings)
        return
    with pytest.raises(
        BlockSizeError,
        match=rf"^rollout\.sglang\.fp8=true with rollout\.sglang\.tp={sizes['tp']} .*{sentence}",
    ):
        check_blocks(settings)


def test_a_model_of_other_dims_is_refused_before_servers_start(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        BlockSizeError, match=r"num_key_value_heads\*head_dim=64 of .*; set rollout\.sglang\.fp8=false$"
    ):
        served(config(tiny_model, tmp_path))
    check_blocks(config(tiny_model, rollout={"sglang": {}}))


def test_a_mixture_with_dense_layers_is_refused_for_servers_only(wide: Path, tiny_model: Path) -> None:
    with pytest.raises(GspoError, match=r"^decoder layer 1 is dense .*; set rollout\.engine=embedded$"):
        check_served(config(wide))
    without = config(wide, rollout={"engine": "embedded", "sglang": {"fp8": False}})
    EmbeddedOpening(without, StopRequest(), main=True)
    check_served(config(tiny_model, rollout={"sglang": {"fp8": False}}))
