"""Every key of the config is applied when a run is continued, or refused, or named as ignored; none is passed over."""

import json
from pathlib import Path
from typing import Any

import pytest

from gspo_mm.checkpoint.manager import ResumeError, RunDir
from gspo_mm.config import Config, parse_config
from gspo_mm.config.load import _holds_section, _section_in
from gspo_mm.config.resume import APPLIED, IGNORED, REFUSED, UNDER_WAY, UNUSED, Command, changes, settings
from gspo_mm.runtime.dist import Ranks

VALUES: dict[str, Any] = {
    "run": {"name": "a"},
    "model": {"path": "m"},
    "data": {
        "train": [{"name": "x", "shards": ["a.tar"], "weight": 1.0, "reward": None}],
        "validation": [{"name": "v", "shards": ["v.tar"], "weight": 1.0, "reward": None}],
        "curriculum": {"key": "k", "start": 0.0, "end": 1.0, "samples": 5},
    },
    "reward": {"file": "r.yaml"},
    "rollout": {"environment": {"python": "a:b"}},
}
# another value of each refused key, and of each that is refused while prompts are under way
OTHER: dict[str, Any] = {
    "run.seed": 5,
    "model.path": "other",
    "model.experts_layout": "published",
    "data.shuffle_buffer": 3,
    "data.curriculum.key": "other",
    "data.curriculum.start": 0.5,
    "data.curriculum.end": 2.0,
    "data.curriculum.samples": 9,
    "policy.dtype": "float32",
    "policy.freeze": ["vision"],
    "policy.optimizer.offload": True,
    "policy.optimizer.moments": "bfloat16",
    "policy.lora": {"rank": 4, "alpha": 8.0, "targets": ["mlp"]},
    "policy.fp8": {"recipe": "tensorwise"},
    "policy.fp8.bf16_layers_at_start": 1,
    "policy.fp8.bf16_layers_at_end": 1,
    "policy.fp8.primary_weights": {"recipe": "tensorwise", "primary_weights": True},
    "data.train.name": "y",
    "data.train.weight": 2.0,
    "data.validation.shards": ["w.tar"],
    "train.eval_prompts": 3,
    "data.max_prompt_tokens": 7,
    "data.min_image_pixels": 7,
    "data.max_image_pixels": 700,
    "data.max_aspect_ratio": 3.0,
    "data.min_pixels": 7,
    "data.max_pixels": 7,
    "rollout.environment.type": {
        "type": "http"
    },  # in place of the whole section, as the other names no `python`
    "rollout.environment.python": "c:d",
    "rollout.environment.args": {"x": 1},
    "rollout.environment.role": "user",
    "rollout.engine": "sglang",
    "rollout.replay": "runs/b",
    "rollout.sampling.temperature": 0.5,
    "rollout.sampling.top_p": 0.5,
    "rollout.sampling.top_k": 5,
}


def leaves(section: Any, prefix: str = "") -> set[str]:
    found: set[str] = set()
    for name, field in section.model_fields.items():
        if _holds_section(field.annotation):
            found |= leaves(_section_in(field.annotation), f"{prefix}{name}.")
        else:
            found.add(prefix + name)
    return found


def config(tmp_path: Path, key: str = "", value: Any = None, **run: Any) -> Config:
    values = json.loads(json.dumps(VALUES))
    values["run"] |= {"dir": str(tmp_path), **run}
    *path, last = key.split(".")
    section = values
    for part in path:
        section = (
            section[part][0]
            if part in ("train", "validation") and "data" in path
            else section.setdefault(part, {})
        )
    if key:
        section[last] = value
    return parse_config(values)


def test_the_table_knows_every_key_of_the_schema_once() -> None:
    kinds = [set(APPLIED), set(REFUSED), set(UNDER_WAY), set(IGNORED)]
    assert set().union(*kinds) == leaves(Config)
    assert sum(map(len, kinds)) == len(leaves(Config))
    for unused in UNUSED.values():
        assert all(any(key.startswith(name) for key in leaves(Config)) for name in unused)


def test_every_key_is_compared(tmp_path: Path) -> None:
    assert settings(config(tmp_path)).keys() == leaves(Config)
    without = parse_config({**VALUES, "data": {"train": ["a.tar"]}})
    assert settings(without).keys() == leaves(Config)


def checkpoint(run: RunDir, **state: Any) -> None:
    folder = run.path / "checkpoints" / "step-00000001"
    (folder / "policy").mkdir(parents=True)
    (folder / "policy" / "weights").write_text("1")
    (folder / "state.json").write_text(json.dumps({"step": 1, **state}))


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_a_refused_key_is_named_with_both_values_the_reason_and_the_fix(key: str, tmp_path: Path) -> None:
    checkpoint(RunDir.open(config(tmp_path), Ranks()))
    RunDir.open(config(tmp_path), Ranks())
    section = key.rpartition(".")[0]
    value = OTHER.get(key, OTHER.get(section))
    place = section if isinstance(value, dict) else key
    with pytest.raises(ResumeError) as caught:
        RunDir.open(config(tmp_path, place, value), Ranks())
    text = str(caught.value)
    assert any(f"{named}=" in text for named in (key, "policy.fp8.primary_weights", "policy.lora.alpha"))
    assert "but the config now says" in text
    assert REFUSED[key] in text
    assert "choose another run.name" in text
    assert "\n" not in text
    RunDir.open(config(tmp_path), Ranks())  # the refused config was not written down


@pytest.mark.parametrize("key", sorted(UNDER_WAY))
def test_a_key_that_prompts_under_way_depend_on_is_refused_while_there_are_some(
    key: str, tmp_path: Path
) -> None:
    run = RunDir.open(config(tmp_path), Ranks())
    checkpoint(run, scheduler={"pending": [{"place": 0}, {"place": 1}]})
    place, named = key, key
    if key == "rollout.environment.type":
        place, named = "rollout.environment", "rollout.environment.(type|python)"
    with pytest.raises(ResumeError, match=rf"{named}=.*under way.*\(2 in the checkpoint\); restore it"):
        RunDir.open(config(tmp_path, place, OTHER[key]), Ranks())
    (run.path / "checkpoints" / "step-00000001" / "state.json").write_text(
        '{"step": 1, "scheduler": {"pending": []}}'
    )
    RunDir.open(config(tmp_path, place, OTHER[key]), Ranks())


def notes(key: str, value: Any, command: Command = "train") -> list[str]:
    old, new = config(Path("r")), config(Path("r"), key, value)
    found = changes(old, new, command=command, under_way=0)
    assert not found.refusals
    return found.notes


def test_what_is_applied_and_what_is_ignored_are_told_apart() -> None:
    assert notes("policy.optimizer.beta2", 0.5) == ["changed settings: policy.optimizer.beta2=0.5 (was 0.98)"]
    (told,) = notes("sft.steps", 7)
    assert told == "changed and ignored: sft.steps=7 (gspo-mm train does not use it)"
    assert notes("sft.steps", 7, "sft") == ["changed settings: sft.steps=7 (was 100)"]
    (told,) = notes("loss.clip_low", 0.001, "sft")
    assert told == "changed and ignored: loss.clip_low=0.001 (gspo-mm sft does not use it)"
    (told,) = notes("data.validation.weight", 3.0)
    assert told.startswith("changed and ignored: data.validation.weight=[3.0] (held-out shards are read")


def test_the_same_model_folder_by_another_path_is_no_change(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    old, new = (config(tmp_path, "model.path", str(tmp_path / name)) for name in ("model", "link"))
    assert changes(old, new, command="train", under_way=0).refusals == []


@pytest.mark.parametrize(("first", "then"), [("sft", "train"), ("train", "sft")])
def test_a_run_of_another_command_is_not_continued(first: Command, then: Command, tmp_path: Path) -> None:
    checkpoint(RunDir.open(config(tmp_path), Ranks(), command=first), command=first)
    with pytest.raises(
        ResumeError, match=rf"holds a run of `gspo-mm {first}`, which `gspo-mm {then}` cannot"
    ):
        RunDir.open(config(tmp_path), Ranks(), command=then)


def test_the_log_of_the_run_names_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    RunDir.open(config(tmp_path), Ranks())
    run = RunDir.open(config(tmp_path, "sft.steps", 3), Ranks())
    assert not caplog.text  # its log file is not open yet
    run.log_notes()
    assert "with changed and ignored: sft.steps=3" in caplog.text
