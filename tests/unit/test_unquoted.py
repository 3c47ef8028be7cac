"""A word or number that YAML reads otherwise than it is written is named, unless it is a switch."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from gspo_mm.config import ConfigError, load_config
from gspo_mm.reward import RewardFileError, load_reward

CONFIG = "run: {name: a}\nmodel: {path: m}\ndata: {train: [a.tar]}\nreward: {file: r.yaml}\n"
REWARD = "name: r\nparts:\n- {name: exact, type: exact, accuracy: true}\n"


def config(tmp_path: Path, text: str, *overrides: str) -> Any:
    given = yaml.safe_load(text) or {}
    kept = "".join(line + "\n" for line in CONFIG.splitlines() if line.partition(":")[0] not in given)
    (tmp_path / "c.yaml").write_text(kept + text)
    return load_config(tmp_path / "c.yaml", list(overrides))


def reward(tmp_path: Path, text: str) -> Any:
    (tmp_path / "r.yaml").write_text(text)
    return load_reward(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("text", "key", "written"),
    [
        ("run: {name: no}", "run.name", "no"),
        ("data: {train: [a.tar, off]}", "data.train.1", "off"),
        ("model: {path: Yes}", "model.path", "Yes"),
        ("data: {train: [{name: on, shards: [a.tar]}]}", "data.train.0.name", "on"),
        ("rollout: {engine: sglang, sglang: {extra_args: {some-flag: no}}}", "some-flag", "no"),
        ("train: {steps: 010}", "train.steps", "010"),
        ("rollout: {sglang: {start_timeout: 1:30}}", "rollout.sglang.start_timeout", "1:30"),
    ],
)
def test_a_config_file_names_the_key_and_says_to_quote_it(
    tmp_path: Path, text: str, key: str, written: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        config(tmp_path, text + "\n")
    assert f"{key}={written} without quotes" in str(caught.value)
    assert f"write '{written}' in quotes" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("override", ["run.name=no", "model.path=off", "data.train=[yes]", "train.steps=010"])
def test_so_does_an_override(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="without quotes"):
        config(tmp_path, "", override)


def test_switches_may_be_words_and_quoted_words_are_texts(tmp_path: Path) -> None:
    loaded = config(
        tmp_path,
        "run: {name: 'no'}\nobserve: {tensorboard: no, report: on}\nsync: {verify: off}\n",
        "checkpoint.background=no",
    )
    assert loaded.run.name == "no"
    assert (loaded.observe.tensorboard, loaded.observe.report, loaded.sync.verify) == (False, True, False)
    assert loaded.checkpoint.background is False


def test_an_override_in_quotes_is_stronger_than_a_word_of_the_file(tmp_path: Path) -> None:
    assert config(tmp_path, "run: {name: no}\n", "run.name='no'").run.name == "no"


@pytest.mark.parametrize("written", ["1e-5", "1.0e-5", "1E-5", "0.00001"])
def test_a_number_with_an_exponent_is_a_number(tmp_path: Path, written: str) -> None:
    assert config(tmp_path, f"policy: {{optimizer: {{lr: {written}}}}}\n").policy.optimizer.lr == 1e-5
    assert config(tmp_path, "", f"policy.optimizer.lr={written}").policy.optimizer.lr == 1e-5


def test_zeros_in_front_that_change_nothing_are_no_fault(tmp_path: Path) -> None:
    assert config(tmp_path, "run: {name: a, seed: 007}\n").run.seed == 7


@pytest.mark.parametrize(
    ("text", "key", "written"),
    [
        ("parts:\n- {name: a, type: exact, tasks: [yes, no]}\n", "parts.0.tasks.0", "yes"),
        ("parts:\n- {name: on, type: exact}\n", "parts.0.name", "on"),
        ("parts:\n- {name: a, type: choice, args: {options: [yes, no]}}\n", "parts.0.args.options.0", "yes"),
        (
            "parts:\n- {name: a, type: exact}\ncases:\n- {answer: no, response: 'no', task: t, score: 1}\n",
            "cases.0.answer",
            "no",
        ),
        (
            "parts:\n- {name: a, type: exact}\ncases:\n- {answer: x, response: Off, task: t, score: 1}\n",
            "cases.0.response",
            "Off",
        ),
        (
            "parts:\n- {name: a, type: exact}\ncases:\n- {answer: [yes, maybe], response: x, task: t, score: 1}\n",
            "cases.0.answer.0",
            "yes",
        ),
        (
            "parts:\n- {name: a, type: exact}\ncases:\n- {answer: 010, response: x, task: t, score: 1}\n",
            "cases.0.answer",
            "010",
        ),
    ],
)
def test_a_reward_file_does_too(tmp_path: Path, text: str, key: str, written: str) -> None:
    with pytest.raises(RewardFileError) as caught:
        reward(tmp_path, "name: r\n" + text)
    assert f"{key}={written} without quotes" in str(caught.value)
    assert f"write '{written}' in quotes" in str(caught.value)


def test_a_key_that_is_a_word_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        RewardFileError, match="the key no without quotes is False in YAML; write 'no' in quotes"
    ):
        reward(tmp_path, REWARD + "cases:\n- {answer: x, response: x, task: t, score: 1, meta: {no: 1}}\n")


def test_switches_of_parts_may_be_words(tmp_path: Path) -> None:
    spec = reward(
        tmp_path, "name: r\nparts:\n- {name: a, type: exact, accuracy: yes, args: {ignore_case: on}}\n"
    ).spec
    assert spec.parts[0].accuracy is True
    assert spec.parts[0].args == {"ignore_case": True}
