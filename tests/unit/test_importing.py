"""Configs of other trainers become ours value by value, and every key is either taken over or named with a reason."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from gspo_mm.cli import app
from gspo_mm.config import Config, ConfigError, load_config
from gspo_mm.importing import read_source, translated

FILES = Path(__file__).parents[1] / "imported"
FILLED = ["model.path=m", "data.train=[a.tar]", "reward.file=r.yaml"]


def text_of(path: Path, gpus: int | None = None) -> str:
    return translated(read_source(path), gpus=gpus, origin=path.name)


def config_of(text: str, tmp_path: Path) -> Config:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return load_config(path, FILLED, any_world=True)


def at(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


PAPER = {"loss.type": "gspo", "loss.level": "sequence", "loss.clip_low": 3e-4, "loss.clip_high": 4e-4}
VALUES: dict[str, dict[str, Any]] = {
    "trl_gspo.py": {
        **PAPER,
        "loss.aggregation": "sequence_mean",
        "loss.kl_coef": 0.0,
        "advantage.std": "unbiased",
        "rollout.prompts_per_step": 8,  # 8 answers in each of 4 parts, 4 of a prompt
        "rollout.group_size": 4,
        "rollout.engine": "embedded",
        "rollout.sampling.max_new_tokens": 6,
        "train.updates_per_batch": 4,
        "train.steps": 3,  # 10 updates, 4 of a batch
        "policy.optimizer.warmup_steps": 1,
        "policy.optimizer.lr": 1e-3,
        "policy.optimizer.min_lr_ratio": 1.0,
        "policy.optimizer.beta2": 0.999,
        "policy.dtype": "float32",
        "policy.recompute": "none",
    },
    "trl_quickstart.yaml": {
        **PAPER,  # in place of 0.4
        "loss.kl_coef": 0.04,
        "rollout.prompts_per_step": 4,
        "train.updates_per_batch": 1,
        "policy.optimizer.lr": 1e-6,
        "policy.optimizer.min_lr_ratio": 0.0,
    },
    "unsloth.py": {
        **PAPER,
        "loss.aggregation": "dr_grpo",
        "advantage.std": "unbiased",  # the loss alone has that name there
        "rollout.prompts_per_step": 2,  # one answer per GPU becomes the four of a prompt
        "data.max_prompt_tokens": 1024,
        "policy.lora.rank": 16,
        "policy.lora.alpha": 32.0,
        "policy.optimizer.grad_clip": 0.1,
        "policy.optimizer.warmup_steps": 6,
        "checkpoint.every": 30,
    },
    "swift.sh": {
        **PAPER,
        "loss.kl_coef": 0.0,
        "rollout.engine": "sglang",
        "rollout.drop_dead_groups": True,
        "rollout.prompts_per_step": 4,  # on 8 GPUs
        "rollout.group_size": 16,
        "rollout.sampling.temperature": 0.9,
        "train.updates_per_batch": 4,
        "policy.optimizer.beta2": 0.95,
        "policy.optimizer.weight_decay": 0.1,
        "policy.lora": None,
    },
    "verl.sh": {
        **PAPER,
        "loss.dual_clip": None,
        "data.max_prompt_tokens": 2048,
        "rollout.sampling.max_new_tokens": 8192,
        "rollout.prompts_per_step": 512,
        "rollout.sampling.top_k": 0,
        "rollout.sglang.tp": 2,
        "policy.micro_batch_tokens": 20480,
        "policy.parallel.tp": 4,
        "policy.parallel.ep": 4,
        "policy.optimizer.warmup_steps": 25,
        "train.updates_per_batch": 4,
        "train.steps": 500,
        "train.eval_every": 10,
        "checkpoint.every": 0,
        "run.name": "gspo-0.0003",
    },
    "areal.yaml": {
        **PAPER,
        "loss.aggregation": "token_mean",
        "rollout.max_staleness": 2,
        "rollout.max_in_flight": 128,
        "rollout.prompts_per_step": 64,
        "rollout.group_size": 4,
        "train.updates_per_batch": 4,
        "train.steps": 200,
        "policy.optimizer.lr": 1.7e-5,
        "policy.optimizer.warmup_steps": 10,
        "policy.micro_batch_tokens": 10240,
        "policy.recompute": "full",
        "run.name": "count-first",
    },
}


@pytest.mark.parametrize("name", VALUES)
def test_a_config_is_translated_value_by_value(name: str, tmp_path: Path) -> None:
    config = config_of(text_of(FILES / name), tmp_path)
    assert {key: at(config, key) for key in VALUES[name]} == VALUES[name]


@pytest.mark.parametrize("name", VALUES)
def test_every_key_is_named_either_where_it_is_taken_over_or_with_a_reason(name: str) -> None:
    text, source = text_of(FILES / name), read_source(FILES / name)
    # what says which model, data or reward it is about stands there by its value
    for key, value in source.keys.items():
        assert f"{key}=" in text or str(value) in text, key


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("trl_quickstart.yaml", "epsilon=0.4"),
        ("unsloth.py", "epsilon=0.2"),
        ("areal.yaml", "actor.eps_clip=0.4"),
    ],
)
def test_a_clip_range_of_tokens_is_refused_at_sequence_level(name: str, key: str) -> None:
    _, listed = text_of(FILES / name).split("# Not translated:")
    assert re.search(rf"{re.escape(key)}.*: refused: .* never clips", listed)


def test_what_is_unknown_and_what_has_no_counterpart_is_listed() -> None:
    _, listed = text_of(FILES / "trl_gspo.py").split("# Not translated:")
    assert "made_up=1: unknown here" in listed
    assert "vllm_mode=colocate: servers here are SGLang's" in listed


def test_a_config_that_is_not_filled_in_is_refused_by_the_missing_key(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text_of(FILES / "trl_gspo.py"))
    with pytest.raises(ConfigError, match=r"model\.path is still to be filled in"):
        load_config(path)


LOSSES = [
    # TRL's arguments -> of ours
    ({"loss_type": "grpo"}, {"type": "grpo", "clip_low": 0.2, "clip_high": 0.2}),
    ({"epsilon_high": 0.28}, {"type": "dapo", "clip_high": 0.28}),
    ({"loss_type": "dr_grpo", "scale_rewards": False}, {"type": "dr_grpo", "aggregation": "dr_grpo"}),
    ({"loss_type": "sapo", "sapo_temperature_neg": 1.2}, {"type": "sapo", "tau_negative": 1.2}),
    (
        {"loss_type": "sapo", "importance_sampling_level": "sequence"},
        {"type": "sapo", "level": "sequence"},
    ),
    ({"loss_type": "cispo", "epsilon_high": 5.0}, {"type": "cispo", "clip_low": None, "clip_high": 4.0}),
    ({"loss_type": "grpo", "delta": 3.0}, {"type": "grpo", "dual_clip": 3.0}),
    ({"loss_type": "vespo"}, {"type": "grpo"}),
]


@pytest.mark.parametrize(("given", "wanted"), LOSSES)
def test_losses_of_trl(given: dict[str, Any], wanted: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "theirs.yaml"
    path.write_text(yaml.safe_dump({"num_generations": 8, **given}))
    config = config_of(text_of(path), tmp_path)
    assert {key: getattr(config.loss, key) for key in wanted} == wanted
    assert config.advantage.std == ("none" if given.get("scale_rewards") is False else "unbiased")


def test_a_batch_is_of_all_gpus_and_updates_that_do_not_divide_it_become_fewer(tmp_path: Path) -> None:
    path = tmp_path / "theirs.yaml"
    path.write_text("{num_generations: 4, per_device_train_batch_size: 2, steps_per_generation: 5}")
    rollout = [config_of(text_of(path, gpus), tmp_path) for gpus in (2, 4)]
    assert [config.rollout.prompts_per_step for config in rollout] == [5, 10]
    path.write_text(
        "{num_generations: 4, per_device_train_batch_size: 4, steps_per_generation: 2, num_iterations: 2}"
    )
    assert config_of(text_of(path), tmp_path).train.updates_per_batch == 2
    assert "num_iterations=2: " in text_of(path)


def test_one_update_over_several_generations_is_one_step(tmp_path: Path) -> None:
    path = tmp_path / "theirs.yaml"
    path.write_text(
        "{num_generations: 4, per_device_train_batch_size: 4, steps_per_generation: 2, gradient_accumulation_steps: 8}"
    )
    config = config_of(text_of(path), tmp_path)
    assert (config.rollout.prompts_per_step, config.train.updates_per_batch) == (8, 1)


def test_verl_is_read_as_yaml_and_as_a_file_of_overrides_too(tmp_path: Path) -> None:
    nested = {
        "actor_rollout_ref": {
            "actor": {"policy_loss": {"loss_mode": "gspo"}, "clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}
        }
    }
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(nested))
    actor = "actor_rollout_ref.actor"
    (tmp_path / "a.txt").write_text(
        f"{actor}.policy_loss.loss_mode=gspo\n+{actor}.clip_ratio_low=3e-4\n{actor}.clip_ratio_high=4e-4\n"
    )
    configs = [config_of(text_of(tmp_path / name), tmp_path) for name in ("a.yaml", "a.txt")]
    assert configs[0] == configs[1]
    assert {key: at(configs[0], key) for key in PAPER} == PAPER


def test_a_notebook_is_read_without_what_is_no_python_in_it(tmp_path: Path) -> None:
    cells = [{"cell_type": "markdown", "source": ["GRPOConfig()"]}]
    cells += [{"cell_type": "code", "source": ["!pip install x\n", "n = 8\n"]}]
    cells += [{"cell_type": "code", "source": ["GRPOConfig(num_generations=n)"]}]
    (tmp_path / "theirs.ipynb").write_text(json.dumps({"cells": cells}))
    assert config_of(text_of(tmp_path / "theirs.ipynb"), tmp_path).rollout.group_size == 8


def test_ms_swift_trains_adapters_unless_told_otherwise_and_json_is_read(tmp_path: Path) -> None:
    (tmp_path / "args.json").write_text('{"rlhf_type": "grpo", "num_generations": 4}')
    config = config_of(text_of(tmp_path / "args.json"), tmp_path)
    assert config.policy.lora is not None
    assert (config.policy.lora.rank, config.policy.optimizer.lr, config.loss.kl_coef) == (8, 1e-4, 0.04)


def test_the_command_writes_a_file_once(tmp_path: Path) -> None:
    words = ["import", str(FILES / "swift.sh"), "-o", str(tmp_path / "written.yaml"), "--gpus", "16"]
    assert CliRunner().invoke(app, words).exit_code == 0
    text = (tmp_path / "written.yaml").read_text()
    assert text == text_of(FILES / "swift.sh", gpus=16)
    assert "is there already" in str(CliRunner().invoke(app, words).exception)
    assert (tmp_path / "written.yaml").read_text() == text


BAD = {
    "nothing.yaml": ("a: 1", "no config that is known here"),
    "twice.py": ("GRPOConfig(beta=1)\nGRPOConfig(beta=2)", "calls GRPOConfig 2 times"),
    "cell.py": ("!pip install x\nGRPOConfig()", "line 1 is no Python"),
    "cold.yaml": ("{num_generations: 4, temperature: 0}", "cold.yaml means a run that is refused here"),
    "by.sh": ("trl grpo --config a.yaml --beta 1", "import that file"),
    "other.json": ('{"rlhf_type": "dpo"}', "rlhf_type=dpo is another algorithm"),
    "lost.yaml": ("{num_generations: 4, beta: '${somewhere}'}", "somewhere"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_imported_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    text, words = BAD[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        text_of(tmp_path / name)
    assert len(str(caught.value).splitlines()) == 1


def test_nothing_of_a_script_runs_and_what_it_computes_is_said_to_be_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "theirs.py"
    path.write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nn = 2\nGRPOConfig(num_generations=n * 4, beta=0.04, learning_rate=rate())\n"
    )
    text = text_of(path)
    assert not (tmp_path / "ran").exists()
    assert config_of(text, tmp_path).rollout.group_size == 8
    assert "learning_rate=rate(): no value that can be read" in text
