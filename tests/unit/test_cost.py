"""The FLOP polynomial equals what torch counts on transformers' own models, operation by operation."""

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gspo_mm.families.cost import FlopModel
from gspo_mm.families.glm4v import Glm4vMoe
from gspo_mm.families.gpt_oss import GptOss
from gspo_mm.families.qwen2_5_vl import Qwen25VL
from gspo_mm.families.qwen3 import Qwen3
from gspo_mm.families.qwen3_5 import Qwen35
from gspo_mm.families.qwen3_vl import Qwen3VL
from tests.tiny_vl import tiny_glm, tiny_hybrid, tiny_sinks, tiny_text, tiny_vl, tiny_windows
from tools.check_parity import random_batch, token_by_token

MODELS: dict[str, dict[str, Any]] = {
    "mixture": {},
    "dense": {"moe": False},
    "mixed": {"mlp_only_layers": [1], "num_hidden_layers": 5, "num_experts_per_tok": 3},
    "every second": {"decoder_sparse_step": 2, "num_key_value_heads": 1, "moe_intermediate_size": 40},
    "wide": {
        "moe": False,
        "hidden_size": 80,
        "num_attention_heads": 8,
        "intermediate_size": 112,
        "vocab_size": 300,
        "vision": {"depth": 4, "hidden_size": 48, "intermediate_size": 72, "deepstack_visual_indexes": [2]},
    },
}
GRIDS = [[], [(4, 6)], [(2, 2), (8, 4), (2, 10)]]


def model_of(name: str, attention: str) -> Any:
    model = tiny_vl(**MODELS[name])
    model.set_attn_implementation(attention)
    return model


def inputs_of(model: Any, grids: list[tuple[int, int]], text: int) -> dict[str, Any]:
    """One sequence: every image with its placeholder tokens, then `text` tokens."""
    config = model.config
    ids: list[int] = []
    for h, w in grids:
        ids += [1, *[config.image_token_id] * (h * w // 4), 2]
    ids += [i % 50 for i in range(text)]
    inputs: dict[str, Any] = {"input_ids": torch.tensor([ids])}
    if grids:
        vision = config.vision_config
        patch_dim = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        inputs["pixel_values"] = torch.randn(sum(h * w for h, w in grids), patch_dim)
        inputs["image_grid_thw"] = torch.tensor([(1, h, w) for h, w in grids])
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == config.image_token_id).int()
    return inputs


def masked(flops: FlopModel, length: int) -> int:
    """What a kernel that does not skip masked pairs counts on top: the square less the causal half."""
    return flops.pair * (length**2 - length * (length + 1) // 2)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("grids", "text", "rows"), [(GRIDS[0], 19, 19), (GRIDS[1], 7, 3), (GRIDS[2], 30, 1)])
def test_forward_flops_are_those_that_torch_counts(
    name: str, grids: list[tuple[int, int]], text: int, rows: int
) -> None:
    model = model_of(name, "eager")  # torch before 2.15 counts nothing for its fused attention on a CPU
    flops = Qwen3VL().flops(model.config)
    inputs = inputs_of(model, grids, text)
    length = inputs["input_ids"].shape[1]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs, use_cache=False, logits_to_keep=rows)
    expected = flops.count([length], rows, [h * w for h, w in grids]) + masked(flops, length)
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize(
    "frozen",
    [
        (),
        ("router",),
        ("vision",),
        ("projector",),
        ("vision", "projector"),
        ("language",),
        ("language", "vision"),
        ("language", "projector"),
    ],
)
@pytest.mark.parametrize("name", ["mixed", "wide"])
def test_forward_and_backward_flops_are_those_that_torch_counts(name: str, frozen: tuple[str, ...]) -> None:
    model = model_of(name, "eager")  # torch counts a fused kernel's recomputed scores as well
    flops = Qwen3VL().flops(model.config).training(frozen)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(parameter_name) not in frozen_parts(frozen))
    inputs = inputs_of(model, GRIDS[2], 11)
    length = inputs["input_ids"].shape[1]
    with FlopCounterMode(display=False) as counter:
        model(**inputs, use_cache=False, logits_to_keep=6).logits.sum().backward()
    expected = flops.count([length], 6, [h * w for h, w in GRIDS[2]]) + masked(flops, length)
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize(
    "shape", [{"moe": False, "tied": True}, {"mlp_only_layers": [1], "num_experts_per_tok": 3}]
)
def test_flops_of_a_model_without_images_are_those_that_torch_counts(shape: dict[str, Any]) -> None:
    model = tiny_text(**shape)
    model.set_attn_implementation("eager")
    flops = Qwen3().flops(model.config)
    with FlopCounterMode(display=False) as counter:
        logits = model(**inputs_of(model, [], 17), use_cache=False, logits_to_keep=5).logits
        assert counter.get_total_flops() == flops.count([17], 5, []) + masked(flops, 17)
        logits.sum().backward()
    update = flops.training()
    assert counter.get_total_flops() == update.count([17], 5, []) + masked(update, 17)


@pytest.mark.parametrize("moe", [True, False])
def test_forward_flops_of_a_hybrid_are_those_that_torch_counts(moe: bool) -> None:
    model = tiny_hybrid(moe=moe, num_hidden_layers=5)  # the last one attends linearly as well
    model.set_attn_implementation("eager")
    text = model.config.text_config
    inputs = inputs_of(model, GRIDS[2], 11)
    length, layers = inputs["input_ids"].shape[1], 4
    with FlopCounterMode(display=False) as counter, torch.no_grad(), token_by_token(model):
        model(**inputs, use_cache=False, logits_to_keep=6)
    flops = Qwen35().flops(model.config)
    expected = flops.count([length], 6, [h * w for h, w in GRIDS[2]]) + masked(flops, length)
    # its memories are multiplied element by element there, and its convolution goes on behind the end
    memory = text.linear_num_value_heads * text.linear_key_head_dim * text.linear_value_head_dim
    channels = 2 * text.linear_num_key_heads * text.linear_key_head_dim
    channels += text.linear_num_value_heads * text.linear_value_head_dim
    expected -= layers * length * 3 * 2 * memory
    expected += layers * (text.linear_conv_kernel_dim - 1) * 2 * channels * text.linear_conv_kernel_dim
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize("frozen", [(), ("vision",)])
def test_flops_of_whole_windows_are_those_that_torch_counts(frozen: tuple[str, ...]) -> None:
    model = tiny_windows(tied=True, vision={"depth": 4, "fullatt_block_indexes": [1, 3]})
    model.set_attn_implementation("eager")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) not in frozen)
    flops, grids = Qwen25VL().flops(model.config), [(4, 4), (8, 4), (4, 12)]
    inputs = inputs_of(model, grids, 11)
    length, patches = inputs["input_ids"].shape[1], [h * w for h, w in grids]
    with FlopCounterMode(display=False) as counter:
        logits = model(**inputs, use_cache=False, logits_to_keep=6).logits
        assert counter.get_total_flops() == flops.count([length], 6, patches) + masked(flops, length)
        logits.sum().backward()
    update = flops.training(frozen)
    assert counter.get_total_flops() == update.count([length], 6, patches) + masked(update, length)


@pytest.mark.parametrize("frozen", [(), ("vision",), ("vision", "projector"), ("projector",), ("router",)])
def test_flops_of_sigmoid_routing_are_those_that_torch_counts(frozen: tuple[str, ...]) -> None:
    model = tiny_glm(n_shared_experts=2, first_k_dense_replace=2)
    model.set_attn_implementation("eager")
    family = Glm4vMoe()
    for name, parameter in model.named_parameters():
        ours = "visual." + name.partition(".visual.")[2] if ".visual." in name else name
        parameter.requires_grad_(
            (family.part_of(ours) if ".visual." in name else part_of(name)) not in frozen
        )
    flops = family.flops(model.config)
    inputs = inputs_of(model, GRIDS[2], 11)
    length, patches = inputs["input_ids"].shape[1], [h * w for h, w in GRIDS[2]]
    with FlopCounterMode(display=False) as counter:
        logits = model(**inputs, use_cache=False, logits_to_keep=6).logits
        assert counter.get_total_flops() == flops.count([length], 6, patches) + masked(flops, length)
        logits.sum().backward()
    update = flops.training(frozen)
    assert counter.get_total_flops() == update.count([length], 6, patches) + masked(update, length)


@pytest.mark.parametrize("shape", [{}, {"sliding_window": 30}, {"layer_types": ["full_attention"] * 4}])
def test_flops_of_sinks_and_windows_are_those_that_torch_counts(shape: dict[str, Any]) -> None:
    model = tiny_sinks(**shape)
    flops = GptOss().flops(model.config)
    windowed = model.config.layer_types.count("sliding_attention")
    with FlopCounterMode(display=False) as counter:
        logits = model(**inputs_of(model, [], 17), use_cache=False, logits_to_keep=5).logits
        counted = counter.get_total_flops()
        logits.sum().backward()
    for passed, expected in ((counted, flops), (counter.get_total_flops(), flops.training())):
        # transformers' kernel skips nothing: 17 x 17 pairs in each layer
        pair = (expected.pair + expected.window_pair) // 4
        seen = sum(min(i, model.config.sliding_window) for i in range(1, 18))
        skipped = pair * (windowed * (17**2 - seen) + (4 - windowed) * (17**2 - 17 * 18 // 2))
        assert passed == expected.count([17], 5, []) + skipped


def frozen_parts(frozen: tuple[str, ...]) -> set[str]:
    return {*frozen, "router"} if "language" in frozen else set(frozen)


def part_of(name: str) -> str:
    if ".visual." in name:
        return "projector" if "merger" in name else "vision"
    return "router" if name.endswith("mlp.gate.weight") else "language"


def test_a_micro_batch_is_the_sum_of_its_sequences_and_its_distinct_images() -> None:
    model = model_of("mixture", "sdpa")
    flops = Qwen3VL().flops(model.config)
    batch = random_batch(model, images=3, seed=5)
    lengths = batch.cu_seqlens.diff().tolist()
    rows = batch.response_cu_seqlens.diff().tolist()
    assert batch.image_grid_thw is not None
    images = sum(flops.image(h * w) for _, h, w in batch.image_grid_thw.tolist())
    assert flops.of_batch(batch) == sum(map(flops.sequence, lengths, rows)) + images
    two_frames = dataclasses.replace(batch, image_grid_thw=batch.image_grid_thw * torch.tensor([2, 1, 1]))
    assert flops.of_batch(two_frames) == flops.of_batch(batch) + images  # frames do not see each other
    text_only = random_batch(model, images=0, seed=5)
    assert flops.of_batch(text_only) == sum(
        map(
            flops.sequence,
            text_only.cu_seqlens.diff().tolist(),
            text_only.response_cu_seqlens.diff().tolist(),
        )
    )


def test_a_causal_sequence_has_one_pair_per_query_and_visible_key() -> None:
    flops = FlopModel(
        token=0, router=0, pair=1, row=0, patch_embedding=0, patch=0, patch_pair=0, merged=0, patches_per_token=4
    )  # fmt: skip
    assert [flops.sequence(length, 0) for length in (1, 2, 3, 10)] == [1, 3, 6, 55]


def test_training_everything_costs_three_forwards_less_the_gradient_of_the_pixels() -> None:
    flops = Qwen3VL().flops(tiny_vl().config)
    sizes = ([40, 60], 25, [16, 24])
    forward, update = flops.count(*sizes), flops.training().count(*sizes)
    assert update == 3 * forward - flops.patch_embedding * (16 + 24)


def test_a_frozen_tower_has_no_backward_pass() -> None:
    flops = Qwen3VL().flops(tiny_vl().config)
    assert flops.training(["vision", "projector"]).image(36) == flops.image(36)
    assert flops.training(["vision", "projector"]).sequence(9, 4) == 3 * flops.sequence(9, 4)
