"""Training on answers in turns, as a user starts it."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from gspo_mm.observe.metrics import read_metrics
from gspo_mm.rollout.saved import load_rollouts
from tests.e2e.conftest import ROOT, gspo_mm
from tests.tars import image_bytes, write_tar

SHOWS = ("rollout.environment.python=tests.environments:Shows", "rollout.environment.max_turns=3")


def test_a_run_trains_on_answers_in_turns(short_config: Path) -> None:
    """Random weights end a turn now and then."""
    settings = ["run.name=turns", "rollout.sampling.max_new_tokens=60", "train.steps=2", "train.eval_every=0"]
    gspo_mm("train", str(short_config), *settings, *SHOWS, PYTHONPATH=str(ROOT))
    run = short_config.parent / "runs" / "turns"
    lines = read_metrics(run)
    groups = [group for step in (1, 2) for group in load_rollouts(run, step)]
    answers = [completion for group in groups for completion in group.completions]
    turns = [len(answer.turns) for answer in answers]
    assert max(turns) > 1
    assert sum(turns) / len(turns) == sum(line["turns/mean"] for line in lines[-2:]) / 2
    assert all(len(answer.token_ids) <= 60 for answer in answers)
    assert lines[-1]["turns/failed"] == 0
    called = [bool(answer.observations) for answer in answers]
    assert sum(called) / len(called) == sum(line["turns/called"] for line in lines[-2:]) / 2
    assert 0 <= lines[-1]["eval/turns/called"] <= 1
    assert "look 1" in (run / "report.html").read_text()


def test_an_environment_that_cannot_be_made_is_refused_before_anything_starts(short_config: Path) -> None:
    wrong = ("rollout.environment.python=tests.environments:Nobody",)
    done = gspo_mm("train", str(short_config), "run.name=wrong", *wrong, check=False, PYTHONPATH=str(ROOT))
    assert done.returncode == 2
    assert "rollout.environment.python=tests.environments:Nobody" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_whose_environment_always_fails_stops_and_says_why(short_config: Path) -> None:
    settings = ["run.name=broken", "rollout.sampling.max_new_tokens=60", "train.eval_every=0"]
    limits = ["rollout.environment.max_failed_fraction=0.01"]
    fails = ("rollout.environment.python=tests.environments:Raises",)
    done = gspo_mm("train", str(short_config), *settings, *fails, *limits, check=False, PYTHONPATH=str(ROOT))
    assert done.returncode == 2
    assert "more than rollout.environment.max_failed_fraction=0.01: the environment of" in done.stderr
    assert "RuntimeError: the tool is broken" in done.stderr


# --- the environments of the README, with a model that was shown once how they are asked

README = (ROOT / "gspo_mm" / "environment" / "README.md").read_text()
CALL = '<tool_call>{"name": "calculate", "arguments": {"formula": "(2 + 3) * 4"}}</tool_call>'
PAGES = [image_bytes(Image.new("RGB", (32, 32 * number), "red")) for number in (1, 2)]
# class -> what is said, by user, model and environment in turn
SHOWN: dict[str, list[Any]] = {
    "Calculator": ["What is (2 + 3) * 4?", CALL, "20", "20."],
    "Pages": ["How many pages?", "next page", PAGES[0], "next page", PAGES[1], "next page", "That was the last page.", "2."],
}  # fmt: skip


def sample(name: str, said: list[Any], pages: Sequence[bytes] = ()) -> list[tuple[str, bytes]]:
    """Members of a shard: a conversation up to the answer that is to be given, and pages that it has not shown yet."""
    roles = ["user", *["assistant", "tool"] * (len(said) // 2)]
    shown = [each for each in said if isinstance(each, bytes)]
    messages = [
        {"role": role, "content": [{"type": "image"} if isinstance(each, bytes) else {"type": "text", "text": each}]}
        for role, each in zip(roles, said, strict=False)
    ]  # fmt: skip
    record = {"messages": messages, "answer": SHOWN[name][-1], "response": SHOWN[name][-1], "task": name}
    record |= {"pages": [f"page{number}.png" for number, _ in enumerate(pages)]}
    return [
        *((f"{name}.{number}.png", data) for number, data in enumerate(shown)),
        *((f"{name}.page{number}.png", data) for number, data in enumerate(pages)),
        (f"{name}.json", json.dumps(record).encode()),
    ]


@pytest.fixture(scope="module")
def warm(short_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of one step of GSPO, for a model that supervised training on every turn has taught both conversations."""
    folder = tmp_path_factory.mktemp("warm")
    members = [member for name, said in SHOWN.items() for member in sample(name, said[:-1])]
    part = {"name": "right", "type": "exact", "accuracy": True}
    (folder / "reward.yaml").write_text(yaml.safe_dump({"name": "right", "parts": [part]}))
    values = yaml.safe_load(short_config.read_text())
    values["run"] |= {"name": "warm", "dir": str(folder)}
    values["data"] = {"train": [write_tar(folder / "shown.tar", members)]}
    values["rollout"]["sampling"] = {"max_new_tokens": 120, "temperature": 1.25}
    values["reward"]["file"] = str(folder / "reward.yaml")
    values["policy"]["optimizer"] = {"lr": 4e-3, "warmup_steps": 5}
    values["train"] = {"steps": 1, "updates_per_batch": 1}
    values["sft"] = {"steps": 50, "batch_size": 8}
    values["checkpoint"] = {"every": 0}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    gspo_mm("sft", str(path))
    values["model"]["path"] = str(folder / "warm" / "hf")
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("name", SHOWN)
def test_the_environments_of_the_readme_are_trained_with(name: str, warm: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"```(?:python|yaml)\n(.*?)```", README, re.DOTALL)
    place = next(i for i, block in enumerate(blocks) if f"class {name}:" in block)
    (tmp_path / "my_tools.py").write_text(blocks[place])
    values = yaml.safe_load(warm.read_text())
    values["rollout"] |= yaml.safe_load(blocks[place + 1])["rollout"]
    values["run"]["name"] = name
    members = sample(name, SHOWN[name][:1], PAGES if name == "Pages" else ())
    values["data"]["train"] = [write_tar(tmp_path / "asked.tar", members)]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    gspo_mm("train", str(tmp_path / "config.yaml"), PYTHONPATH=f"{ROOT}:{tmp_path}")
    run = warm.parent / name
    (line,) = (line for line in read_metrics(run) if line["step"])
    assert line["turns/failed"] == 0
    assert line["grad_norm"] > 0
    answers = [completion for group in load_rollouts(run, 1) for completion in group.completions]
    turns, came_back = SHOWN[name][1::2], SHOWN[name][2::2]
    learned = [answer for answer in answers if [turn.text for turn in answer.turns] == turns]
    assert learned
    for answer in learned:
        assert [o.images[0].data if o.images else o.text for o in answer.observations] == came_back
