"""A parallel plan that does not fit is refused in one sentence that names key, value and fix."""

import pytest

from gspo_mm.config import ParallelConfig
from gspo_mm.config.layout import ModelDims
from gspo_mm.policy.parallel import ParallelPlan

DIMS = ModelDims(
    hidden=64, num_layers=12, num_heads=8, num_kv_groups=2, num_experts=8, expert_ffn=24, deepstack_levels=3
)


def test_open_sizes_are_filled_in() -> None:
    plan = ParallelPlan.from_config(ParallelConfig(tp=2, pp=2, ep=2), 16)
    assert plan == ParallelPlan(tp=2, pp=2, ep=2, etp=2, dp=4)
    assert plan.world_size == 16
    assert ParallelPlan.from_config(ParallelConfig(tp=2, etp=1, ep=4), 4).etp == 1


def test_a_world_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tp=3 pp=1 cp=1 needs a multiple of 3 ranks but 4 started"):
        ParallelPlan.from_config(ParallelConfig(tp=3), 4)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (ParallelPlan(tp=3), r"policy\.parallel\.tp=3 .* num_attention_heads=8; use one of 1, 2, 4, 8"),
        (ParallelPlan(tp=4), r"policy\.parallel\.tp=4 .* num_key_value_heads=2; use one of 1, 2"),
        (ParallelPlan(etp=5), r"policy\.parallel\.etp=5 .* moe_intermediate_size=24; use one of 1, 2, 3"),
        (
            ParallelPlan(pp=5),
            r"policy\.parallel\.pp=5 .* num_hidden_layers=12; with vpp=1 use pp as one of 1, 2, 3",
        ),
        (ParallelPlan(pp=4, vpp=2), r"pp=4 vpp=2 .* does not divide the model's num_hidden_layers=12"),
        (ParallelPlan(pp=3, vpp=2), r"puts 2 layers on the first pipeline stage.* first 3 \(DeepStack\)"),
        (ParallelPlan(pp=3, first_stage_layers=2), r"puts 2 layers on the first pipeline stage"),
        (
            ParallelPlan(pp=3, first_stage_layers=5),
            r"first_stage_layers=5, last_stage_layers=None\) does not divide",
        ),
        (
            ParallelPlan(pp=2, first_stage_layers=5, last_stage_layers=5),
            r"does not divide the model's num_hidden",
        ),
        (ParallelPlan(ep=6), r"policy\.parallel\.ep=6 .* num_experts=8; use one of 1, 2, 4, 8"),
    ],
)
def test_sizes_must_divide_the_model(plan: ParallelPlan, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan.check_model(DIMS)


def test_a_dense_model_has_no_experts_to_spread() -> None:
    dense = ModelDims(hidden=64, num_layers=6, num_heads=8, num_kv_groups=2, num_experts=0)
    ParallelPlan(tp=2, etp=2).check_model(dense)
    ParallelPlan(tp=2, pp=3).check_model(dense)
    with pytest.raises(ValueError, match=r"ep=2 but the model has no experts; use 1"):
        ParallelPlan(ep=2).check_model(dense)


def test_tensor_and_context_ranks_together_divide_linear_attention() -> None:
    hybrid = ModelDims(hidden=64, num_layers=8, num_heads=8, num_kv_groups=8, num_experts=0, linear_heads=4)
    ParallelPlan(tp=2, cp=2).check_model(hybrid)
    message = r"tp=2 times cp=4 does not divide .*linear_num_key_heads=4.*one of 1, 2, 4"
    with pytest.raises(ValueError, match=message):
        ParallelPlan(tp=2, cp=4).check_model(hybrid)


@pytest.mark.parametrize(
    "plan",
    [
        ParallelPlan(pp=4),
        ParallelPlan(pp=2, vpp=2),
        ParallelPlan(pp=3, first_stage_layers=3, last_stage_layers=2),
        ParallelPlan(pp=2, first_stage_layers=7, last_stage_layers=5),
        ParallelPlan(pp=3, last_stage_layers=4),
    ],
)
def test_layers_may_be_spread_unevenly_over_stages(plan: ParallelPlan) -> None:
    plan.check_model(DIMS)


def test_a_world_of_one_needs_no_launcher_and_can_be_set_up_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import parallel_state

    from gspo_mm.policy import cpu

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    cpu.install()
    for seed in (0, 1):
        ParallelPlan().initialize(seed)
        assert parallel_state.get_tensor_model_parallel_world_size() == 1
        assert parallel_state.get_data_parallel_world_size() == 1


def test_a_plan_for_more_ranks_than_started_is_refused() -> None:
    with pytest.raises(ValueError, match=r"is for 2 ranks but 1 started; start 2"):
        ParallelPlan(dp=2).initialize(0)
