"""What is chosen for speed: by machine and layout, with a reason, and under the user's own settings of megatron."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen as varlen
import torch.nn.functional as F
from transformers import SiglipVisionConfig, SiglipVisionModel

from gspo_mm.config import ParallelConfig, PolicyConfig, load_config
from gspo_mm.config.layout import PlanError
from gspo_mm.families.table import family_of
from gspo_mm.policy import spec, speed
from gspo_mm.policy.engine import Policy
from gspo_mm.policy.model import transformer_config
from gspo_mm.policy.parallel import ParallelPlan
from gspo_mm.policy.speed import Choice, choices, overlaps_reduction
from gspo_mm.policy.vision import attend_to_all_images
from tests.tiny_vl import save, tiny_text, tiny_vl, tiny_windows, wide_vl

MIXTURE = {"num_moe_experts": 8, "activation_func": F.silu, "gated_linear_unit": True}
ON_A_CPU = {"prompts shared by their answers"}
ON_A_GPU = {
    "fused layers",
    "images attended to at once",
    "experts in one grouped product",
    "rows sorted by expert in one kernel",
    "routing in one kernel",
    "activation in one kernel",
}
OVERLAPS = {"gradients reduced during backward", "parameters gathered during forward"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_vl(), tmp_path_factory.mktemp("hf"))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec, "FUSED", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def on(found: list[Choice]) -> set[str]:
    return {choice.name for choice in found if choice.on}


def of(policy: dict[str, Any], world: int = 1, architecture: dict[str, Any] = MIXTURE) -> set[str]:
    config = PolicyConfig.model_validate(policy)
    return on(choices(config, ParallelPlan.from_config(config.parallel, world), architecture))


def test_a_cpu_shares_prompts_and_has_none_of_the_rest() -> None:
    assert of({}) == ON_A_CPU
    assert of({"share_prompts": False}) == of({"moe": {"aux_loss": 0.01}}) == set()


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("policy", "world", "more", "less"),
    [
        ({}, 1, set(), set()),
        ({}, 2, OVERLAPS, set()),
        ({"parallel": {"cp": 2}}, 2, OVERLAPS, set()),
        ({"optimizer": {"overlap": False}}, 2, set(), set()),
        ({"parallel": {"ep": 2}}, 2, {*OVERLAPS, "experts' weight gradients during dispatch"}, set()),
        ({"moe": {"aux_loss": 0.1}}, 1, set(), {"routing in one kernel"}),
        ({"dtype": "float32"}, 1, set(), {"images attended to at once"}),
        ({"recompute": "selective"}, 1, {"recomputation"}, set()),
        ({"megatron": {"moe_permute_fusion": False}}, 1, set(), {"rows sorted by expert in one kernel"}),
    ],
)
def test_a_gpu_has_what_its_layout_allows(
    policy: dict[str, Any], world: int, more: set[str], less: set[str]
) -> None:
    assert of(policy, world) == (ON_A_GPU | more) - less


@pytest.mark.usefixtures("gpu")
def test_a_dense_model_of_another_activation_has_less() -> None:
    gelu = {"activation_func": F.gelu, "gated_linear_unit": True}
    assert of({}, architecture=gelu) == {"fused layers", "images attended to at once"}


def test_each_choice_says_why() -> None:
    found = choices(PolicyConfig(), ParallelPlan(), MIXTURE)
    assert all(choice.why for choice in found)
    assert len({choice.name for choice in found}) == len(found)


@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        ("moe_ruoter_fusion", True, "moe_ruoter_fusion is no setting .* did you mean moe_router_fusion"),
        ("tensor_model_parallel_size", 2, "tensor_model_parallel_size=2 is decided by .*it is 1"),
        ("num_layers", 2, "num_layers=2 is decided by the model"),
        ("fp8", "e4m3", "policy.megatron.fp8='e4m3' is decided by"),
    ],
)
def test_megatrons_settings_that_are_not_the_users_to_make(
    name: str, value: Any, fault: str, folder: Path
) -> None:
    with pytest.raises(PlanError, match=fault):
        Policy.from_hf(str(folder), PolicyConfig(megatron={name: value}), seed=0, total_steps=1)


def test_megatrons_settings_reach_it(folder: Path) -> None:
    family = family_of(str(folder))
    hf = family.load_config(str(folder))
    made = transformer_config(
        family,
        hf,
        ParallelPlan(),
        PolicyConfig(megatron={"moe_deepep_num_sms": 24, "bias_activation_fusion": True}),
    )
    assert (made.moe_deepep_num_sms, made.bias_activation_fusion) == (24, True)


def test_overlap_is_the_users_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    two, wanted = ParallelPlan.from_config(ParallelConfig(), 2), {"optimizer": {"overlap": True}}
    assert not overlaps_reduction(PolicyConfig(), two)
    assert overlaps_reduction(PolicyConfig.model_validate(wanted), two)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert overlaps_reduction(PolicyConfig(), two)
    assert not overlaps_reduction(PolicyConfig(), ParallelPlan())


def test_a_process_without_a_gpu_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    config = load_config(Path("configs/quickstart.yaml"), ["policy.parallel.tp=2"], any_world=True)
    assert not on(speed.prepare_process(config))
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in os.environ


def test_transfers_start_before_the_products_that_hide_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    for name in ("CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", asked.append)
    for sizes, expected in ((["policy.parallel.tp=2"], "1"), (["policy.parallel.cp=2"], "1"), ([], None)):
        monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
        speed.prepare_process(load_config(Path("configs/quickstart.yaml"), sizes, any_world=True))
        assert os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == expected
    assert asked == ["expandable_segments:True"] * 3
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")
    shares = ["sync.mode=tensor", "rollout.sglang.colocate=true"]
    config = load_config(Path("configs/quickstart_sglang.yaml"), shares, any_world=True)
    speed.prepare_process(config)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    speed.prepare_process(config)
    assert len(asked) == 3


# ends of what sees itself, block by block: 4 x 4 patches are a window of the second tower, whose grids have ragged edges
IMAGES = [[0, 256, 288, 352]]
WINDOWS = [[0, 16, 24, 40, 48, 56, 60, 76, 84, 92, 96], [0, 60, 76, 96]]


@pytest.mark.parametrize(
    ("make", "sizes", "ends"),
    [
        (wide_vl, [(16, 16), (8, 4), (8, 8)], IMAGES * 3),
        (tiny_windows, [(10, 6), (4, 4), (2, 10)], [WINDOWS[0], WINDOWS[1], WINDOWS[0]]),
    ],
    ids=["images", "windows of images"],
)
def test_all_images_of_a_micro_batch_are_attended_to_in_one_call(
    make: Any, sizes: list[tuple[int, int]], ends: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the kernel for variable lengths, here written out: each image sees itself, as in transformers' own loop."""
    calls: list[list[int]] = []

    def kernel(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        query_offsets: torch.Tensor,
        key_offsets: torch.Tensor,
        longest: int,
        _: int,
    ) -> torch.Tensor:
        assert query.is_contiguous()
        assert query_offsets.dtype == key_offsets.dtype == torch.int32
        assert longest == int(query_offsets.diff().max())
        calls.append(query_offsets.tolist())
        sizes = query_offsets.diff().tolist()
        parts = zip(*(t.transpose(0, 1).split(sizes, dim=1) for t in (query, key, value)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*part) for part in parts], dim=1).transpose(0, 1)

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    tower = make().model.visual
    grids = torch.tensor([(1, *size) for size in sizes])
    pixels = torch.randn(int(grids.prod(-1).sum()), 3 * 2 * tower.config.patch_size**2)
    expected = tower(pixels, grid_thw=grids)
    attend_to_all_images(tower)
    found = tower(pixels, grid_thw=grids)
    assert calls == ends
    torch.testing.assert_close(found.pooler_output, expected.pooler_output, rtol=0, atol=1e-6)
    for level, other in zip(
        getattr(found, "deepstack_features", []), getattr(expected, "deepstack_features", []), strict=True
    ):
        torch.testing.assert_close(level, other, rtol=0, atol=1e-6)


def test_a_tower_of_images_of_one_size_is_left_alone() -> None:
    tower = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=28
        )
    )
    before = tower.config._attn_implementation
    attend_to_all_images(tower)
    assert tower.config._attn_implementation == before


@pytest.mark.parametrize(("make", "sees"), [(tiny_text, False), (tiny_vl, True)])
def test_a_run_without_images_hears_of_the_decoder_alone(
    make: Callable[[], Any], sees: bool, tmp_path: Path
) -> None:
    folder = save(make(), tmp_path)
    config = load_config(Path("configs/quickstart.yaml"), [f"model.path={folder}"], any_world=True)
    names = {choice.name for choice in speed.choices_of_run(config, ranks=1)}
    assert ("images attended to at once" in names) is sees
    assert "experts in one grouped product" in names
