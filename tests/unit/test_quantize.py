"""FP8 in blocks: the numbers, which tensors it is for, and the audit that a server means the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gspo_mm.config import Config, parse_config
from gspo_mm.families.folder import read_hf
from gspo_mm.families.table import family_of
from gspo_mm.serving.served import (
    BLOCK,
    SCALE,
    quantized_names,
)
from gspo_mm.serving.server import ServerError
from gspo_mm.sync.quantize import FP8, Quantizer, audit_one, on_the_way, quantize
from tests.conftest import run_tool

WIDE = ["text.hidden_size=256", "text.head_dim=64", "text.moe_intermediate_size=384"]
LAYER = "model.language_model.layers"


def make(folder: Path, *settings: str, family: str = "qwen3_vl_moe") -> Path:
    sets = [item for setting in settings for item in ("--set", setting)]
    run_tool("make_tiny_model.py", folder, "--family", family, *sets)
    return folder


def make_wide(path: Path) -> Path:
    """Of dims that blocks fit into; 4 experts, and a dense layer between two mixtures."""
    return make(path, *WIDE, "text.num_experts=4", "text.mlp_only_layers=[1]")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wide(tmp_path_factory.mktemp("wide") / "model")


def config(path: Path, run_dir: Path | str = "runs", **sections: dict[str, Any]) -> Config:
    values: dict[str, Any] = {
        "run": {"name": "fp8", "dir": str(run_dir)},
        "model": {"path": str(path)},
        "data": {"train": ["train.tar"]},
        "reward": {"file": "configs/rewards/digits.yaml"},
        "policy": {"dtype": "bfloat16", "optimizer": {"lr": 1e-3}},
        "rollout": {"engine": "sglang", "sglang": {"fp8": True}},
    }
    for section, changes in sections.items():
        values[section] = values[section] | changes
    return parse_config(values)


def quantizer(path: Path) -> Quantizer:
    family = family_of(path)
    return Quantizer(family, family.load_config(str(path)))


def dequantized(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Element by element, float64."""
    rows, columns = torch.arange(weight.shape[0]), torch.arange(weight.shape[1])
    return weight.double() * scales.double()[rows[:, None] // BLOCK, columns // BLOCK]


# the numbers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_whole_blocks_have_the_bits_of_transformers_own_quantizer(dtype: torch.dtype) -> None:
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    weight = torch.randn(384, 512, generator=torch.Generator().manual_seed(1)).to(dtype) * 0.05
    weight[128:256, :128] = 0
    weight[256:, 384:] *= 1000
    settings: Any = SimpleNamespace(
        quantization_config=FineGrainedFP8Config(weight_block_size=(BLOCK, BLOCK))
    )
    theirs = Fp8Quantize(settings).convert({"x.weight": weight})
    ours, scales = quantize(weight)
    assert ours.dtype == theirs["x.weight"].dtype == FP8
    assert torch.equal(ours.view(torch.uint8), theirs["x.weight"].view(torch.uint8))
    assert torch.equal(scales, theirs["x.weight_scale_inv"])
    assert "x.weight" + SCALE == "x.weight_scale_inv"


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (1, 1), (130, 300), (127, 129), (64, 640)])
def test_the_error_is_at_most_half_a_step_of_the_format_also_in_ragged_last_blocks(
    shape: tuple[int, int],
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 0.02
    quantized, scales = quantize(weight)
    assert quantized.shape == weight.shape
    assert scales.shape == (-(-shape[0] // BLOCK), -(-shape[1] // BLOCK))
    assert scales.dtype == torch.float32
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            own = (slice(row * BLOCK, (row + 1) * BLOCK), slice(column * BLOCK, (column + 1) * BLOCK))
            block, scale = weight[own].double(), scales[row, column].double()
            assert abs(scale / (block.abs().max() / 448) - 1) < 1e-6
            # e4m3: 3 bits after the point, so half a step is 1/16; below 2**-6 steps are 2**-9 wide
            bound = (block.abs() / 16).maximum(scale * 2**-10) * (1 + 1e-6)
            assert ((quantized[own].double() * scale - block).abs() <= bound).all()


def test_a_block_of_zeros_stays_zeros_and_what_is_not_a_number_does_not_become_one() -> None:
    weight = torch.ones(128, 640)
    weight[:, :128] = 0
    weight[:, 128:256] = 1e-40
    weight[3, 256], weight[5, 384] = torch.nan, torch.inf
    quantized, scales = quantize(weight)
    back = dequantized(quantized, scales)
    assert scales[0, :2].tolist() == [1.0, 1.0]
    assert not back[:, :256].any()
    assert back[3, 256].isnan()
    assert back[5, 384].isnan()
    assert (back[:, 512:] - 1).abs().max() < 1e-6


def test_a_block_knows_nothing_of_the_others() -> None:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(3))
    whole, scales = quantize(weight)
    part, part_scales = quantize(weight[128:, :128])
    assert torch.equal(whole[128:, :128].view(torch.uint8), part.view(torch.uint8))
    assert torch.equal(scales[1:, :1], part_scales)


# the stream


def test_names_that_hold_the_name_of_a_quantized_layer_are_left_alone(wide: Path) -> None:
    tensor = torch.ones(128, 128)
    names = [
        f"{LAYER}.1.mlp.gate.weight",  # of gate_proj, and of gate_up_proj
        f"{LAYER}.1.mlp.gate_proj.weight_extra",
        f"{LAYER}.1.mlp.gate_proj.weight.copy",
        f"{LAYER}.11.mlp.gate_proj.weight",  # there is no layer 11
        f"draft.{LAYER}.1.mlp.gate_proj.weight",
        f"{LAYER}.1.mlp.down_proj_norm.weight",
        f"{LAYER}.0.mlp.experts.4.down_proj.weight",  # there is no expert 4
        f"{LAYER}.0.mlp.shared_experts.0.down_proj.weight",
        "model.visual.layers.1.self_attn.q_proj.weight",
        f"{LAYER}.1.self_attn.q_proj.bias",
    ]
    assert [name for name, _ in quantizer(wide)((name, tensor) for name in names)] == names
    real = f"{LAYER}.1.mlp.gate_proj.weight"
    assert [name for name, _ in quantizer(wide)([(real, tensor)])] == [real, real + SCALE]


def apart(tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Fused experts one by one, written out."""
    for name, tensor in tensors:
        parent, _, last = name.rpartition(".")
        if not parent.endswith(".experts"):
            yield name, tensor
        elif last == "down_proj":
            yield from ((f"{parent}.{e}.down_proj.weight", one) for e, one in enumerate(tensor))
        else:
            for e, one in enumerate(tensor):
                half = len(one) // 2
                yield f"{parent}.{e}.gate_proj.weight", one[:half]
                yield f"{parent}.{e}.up_proj.weight", one[half:]


def test_experts_in_one_piece_or_apart_become_the_same_stream_and_the_rest_passes_untouched(
    wide: Path,
) -> None:
    folder = dict(read_hf(wide))
    fused = dict(quantizer(wide)(folder.items()))
    one_by_one = list(quantizer(wide)(apart(iter(folder.items()))))
    family = family_of(wide)
    names = quantized_names(family, family.load_config(str(wide)))
    assert (
        fused.keys()
        == dict(one_by_one).keys()
        == {n for n, _ in apart(iter(folder.items()))} | {n + SCALE for n in names}
    )
    for number, (name, tensor) in enumerate(one_by_one):
        assert tensor.nbytes == fused[name].nbytes
        assert torch.equal(tensor.contiguous().view(torch.uint8), fused[name].contiguous().view(torch.uint8))
        if name in names:
            assert one_by_one[number + 1][0] == name + SCALE
        elif name in folder:
            assert tensor is folder[name]


def test_without_fp8_nothing_happens_on_the_way(wide: Path) -> None:
    tensors = [(f"{LAYER}.0.self_attn.q_proj.weight", torch.ones(256, 256))]
    assert list(on_the_way(config(wide, rollout={"sglang": {}}))(tensors)) == tensors


# the audit


@pytest.fixture(scope="module")
def layers(wide: Path) -> dict[str, tuple[str, ...]]:
    family = family_of(wide)
    return dict(family.linear_layers(family.load_config(str(wide))))


@pytest.fixture(scope="module")
def sent(wide: Path) -> set[str]:
    return {name for name, _ in quantizer(wide)(read_hf(wide))}


def held(layers: dict[str, tuple[str, ...]]) -> set[str]:
    return set(layers)


def test_the_servers_names_are_its_merged_ones(layers: dict[str, tuple[str, ...]]) -> None:
    assert set(layers) == {
        *(f"model.layers.{n}.self_attn.{x}_proj.weight" for n in range(3) for x in ("qkv", "o")),
        *(f"model.layers.{n}.mlp.experts.{x}_weight" for n in (0, 2) for x in ("w13", "w2")),
        *(f"model.layers.1.mlp.{x}_proj.weight" for x in ("gate_up", "down")),
    }


def test_equal_sets_pass_with_and_without_fp8(layers: dict[str, tuple[str, ...]], sent: set[str]) -> None:
    audit_one("a", layers, sent, held(layers))
    audit_one("a", layers, [name for name in sent if not name.endswith(SCALE)], set())


def test_a_layer_that_the_server_keeps_is_named(layers: dict[str, tuple[str, ...]], sent: set[str]) -> None:
    missing = held(layers) - {
        "model.layers.1.mlp.gate_up_proj.weight",
        "model.layers.2.self_attn.o_proj.weight",
    }
    first = f"{LAYER}.1.mlp.gate_proj.weight"
    with pytest.raises(
        ServerError, match=rf"server a and trainer .* FP8: 3 were sent so only, first {first};"
    ):
        audit_one("a", layers, sent, missing)


@pytest.mark.parametrize("extra", ["model.layers.0.mlp.gate.weight", "visual.blocks.0.attn.qkv_proj.weight"])
def test_a_layer_that_only_the_server_quantizes_is_named(
    layers: dict[str, tuple[str, ...]], sent: set[str], extra: str
) -> None:
    """`mlp.gate` is a part of the name `mlp.gate_up_proj`, and `qkv_proj` is one of attention elsewhere."""
    with pytest.raises(ServerError, match=rf"FP8: 1 are held so only, first {extra}; see"):
        audit_one("a", layers, sent, {*held(layers), extra})


def test_a_part_of_a_merged_layer_without_scales_is_noticed(
    layers: dict[str, tuple[str, ...]], sent: set[str]
) -> None:
    lost = f"{LAYER}.2.mlp.experts.3.up_proj.weight{SCALE}"
    with pytest.raises(
        ServerError, match=r"1 are held so only, first model\.layers\.2\.mlp\.experts\.w13_weight"
    ):
        audit_one("a", layers, sent - {lost}, held(layers))


def test_a_trainer_that_does_not_quantize_and_a_server_that_does_are_both_told(
    layers: dict[str, tuple[str, ...]], sent: set[str]
) -> None:
    plain = [name for name in sent if not name.endswith(SCALE)]
    with pytest.raises(
        ServerError, match=r"12 are held so only, first model\.layers\.0\.mlp\.experts\.w13_weight"
    ):
        audit_one("a", layers, plain, held(layers))
    with pytest.raises(
        ServerError, match=rf"39 were sent so only, first {LAYER}\.0\.mlp\.experts\.0\.down_proj"
    ):
        audit_one("a", layers, sent, set())
