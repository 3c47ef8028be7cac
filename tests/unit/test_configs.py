"""The configs that a newcomer reads are valid and say what each key means."""

from pathlib import Path

import pytest

from gspo_mm.config import load_config
from gspo_mm.plan.setup import job_of
from gspo_mm.plan.step import plan_of
from gspo_mm.reward.spec import load_reward
from tools.config_keys import keys_page

FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
# config -> nodes, rollout nodes, GPU; and its layout: tp, pp, ep, dp
LARGE = {
    FOLDER / "qwen3_vl_30b_a3b.yaml": (4, 2, "h200", (2, 1, 8, 16)),
    FOLDER / "qwen3_vl_235b_a22b.yaml": (16, 8, "h200", (4, 4, 8, 8)),
    FOLDER / "qwen3_vl_8b.yaml": (1, 0, "h100", (2, 1, 1, 4)),
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_shipped_config_loads(path: Path) -> None:
    assert load_config(path, any_world=path in LARGE).run.path.parts[0] == "runs"


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


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.name)
def test_a_large_config_is_planned_as_its_head_says_and_fits(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes, rollout_nodes, gpu, sizes = LARGE[path]
    monkeypatch.setenv("WORLD_SIZE", str(8 * nodes))
    config = load_config(path)
    made = job_of(config, nodes=nodes, rollout_nodes=rollout_nodes, per_node=8, gpu=gpu)
    plan = made.policy.sizes
    assert (plan.tp, plan.pp, plan.ep, plan.dp) == sizes
    assert plan_of(made).fits
    # the command that its head names
    told = f"#   gspo-mm plan configs/{path.name}"
    told += (
        f" --nodes {nodes}" * (nodes > 1)
        + f" --rollout-nodes {rollout_nodes}" * (rollout_nodes > 0)
        + f" --gpu {gpu}\n"
    )
    assert told in path.read_text()


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.name)
def test_a_large_config_has_room_for_the_longest_answer(path: Path) -> None:
    config = load_config(path, any_world=True)
    longest = config.data.max_prompt_tokens + config.rollout.sampling.max_new_tokens
    assert longest <= config.policy.micro_batch_tokens


def test_the_page_of_keys_is_that_of_the_schema_and_says_of_each_what_it_means() -> None:
    page = keys_page()
    assert (FOLDER / "keys.md").read_text() == page, "run tools/config_keys.py"
    assert not [line for line in page.splitlines() if line.endswith("|  |")]
