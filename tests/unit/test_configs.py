"""The configs that a newcomer reads are valid and say what each key means."""

from pathlib import Path

import pytest

from gspo_mm.config import load_config
from gspo_mm.config.layout import ModelDims
from gspo_mm.policy.parallel import ParallelPlan
from gspo_mm.reward.spec import load_reward

FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
LARGE = FOLDER / "qwen3_vl_30b_a3b.yaml"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_shipped_config_loads(path: Path) -> None:
    assert load_config(path, any_world=path == LARGE).run.path.parts[0] == "runs"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_shipped_config_names_a_reward_file_that_loads(path: Path) -> None:
    load_reward(FOLDER.parent / load_config(path, any_world=True).reward.file)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_key_of_a_shipped_config_is_commented(path: Path) -> None:
    for line in path.read_text().splitlines():
        is_setting = ":" in line and not line.lstrip().startswith("#") and not line.rstrip().endswith(":")
        assert not is_setting or "# " in line, f"{path.name}: {line.strip()} has no comment"


def test_the_seed_names_run_and_warm_start() -> None:
    sft, train = (load_config(FOLDER / f"quickstart{s}.yaml", ["run.seed=7"]) for s in ("_sft", ""))
    assert train.model.path == str(sft.run.path / "hf")
    assert train.run.name == "quickstart-7"


def test_the_large_config_fits_its_model_on_4_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "32")
    config = load_config(LARGE)
    dims = ModelDims(  # of Qwen3-VL-30B-A3B's config.json
        hidden=2048,
        num_layers=48,
        num_heads=32,
        num_kv_groups=4,
        num_experts=128,
        expert_ffn=768,
        deepstack_levels=3,
    )
    plan = ParallelPlan.from_config(config.policy.parallel)
    plan.check_model(dims)
    assert (plan.tp, plan.ep, plan.dp) == (2, 8, 16)


def test_the_large_config_has_room_for_the_longest_answer() -> None:
    config = load_config(LARGE, any_world=True)
    longest = config.data.max_prompt_tokens + config.rollout.sampling.max_new_tokens
    assert longest <= config.policy.micro_batch_tokens
