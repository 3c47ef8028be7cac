"""The first commands of somebody new: eval with its answers, chat."""

import json
from pathlib import Path
from statistics import fmean

import pytest
from typer.testing import CliRunner

from gspo_mm.cli import app
from gspo_mm.data.places import expand_shards
from gspo_mm.data.shards import read_shard
from tests.e2e.conftest import gspo_mm


@pytest.fixture(scope="module")
def evaluated(short_config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, float], Path]:
    """What `eval --save` prints of random weights, and its file."""
    saved = tmp_path_factory.mktemp("evaluated") / "new" / "answers.jsonl"
    done = gspo_mm("eval", str(short_config), "--save", str(saved))
    return json.loads(done.stdout), saved


def test_eval_saves_each_answer_with_its_reward(
    evaluated: tuple[dict[str, float], Path], short_config: Path
) -> None:
    metrics, saved = evaluated
    lines = [json.loads(line) for line in saved.read_text().splitlines()]
    assert len({line["key"] for line in lines}) == 16
    assert fmean(line["accuracy"] for line in lines) == metrics["eval/accuracy"]
    assert fmean(line["reward"] for line in lines) == metrics["eval/reward"]
    assert all(line["reward"] == line["parts"]["vowel"] for line in lines)
    vowels = [any(letter in line["response"] for letter in "aeiou") for line in lines]
    assert [bool(line["reward"]) for line in lines] == vowels
    scored = CliRunner().invoke(app, ["reward", str(short_config), "--input", str(saved), "--rows", "1"])
    assert scored.exit_code == 0, scored.output
    assert lines[0]["key"] in scored.output


def test_chat_answers_as_evaluation_does(
    evaluated: tuple[dict[str, float], Path], tiny_model: Path, digit_shards: Path, tmp_path: Path
) -> None:
    (shard,) = expand_shards([str(digit_shards / "validation-*.tar")])
    asked = next(iter(read_shard(shard)))
    wanted = json.loads(evaluated[1].read_text().splitlines()[0])
    assert wanted["key"].endswith(asked["__key__"])
    (tmp_path / "digit.png").write_bytes(asked.get("png") or asked["0.png"])
    (message,) = json.loads(asked["json"])["messages"]
    question = next(part["text"] for part in message["content"] if part["type"] == "text")
    command = ["chat", str(tiny_model), "--max-new-tokens", "6", "--image", str(tmp_path / "digit.png")]
    done = CliRunner().invoke(app, [*command, question])
    assert done.exit_code == 0, done.output
    assert done.stdout == wanted["response"] + "\n"
    # line by line, what a question cannot hold is said, and the next is asked
    lines = CliRunner().invoke(app, command, input=f"{question}\n\nwith <|im_end|>\nand now?\n")
    assert lines.exit_code == 0, lines.output
    assert lines.stdout.startswith(wanted["response"] + "\n")
    assert "special token in text: <|im_end|>" in lines.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["MODEL", "?", "--image", "none.png"], "--image none.png cannot be read: No such file or directory"),
        (
            ["MODEL", "?", "--image", __file__],
            "test_first_hour.py is no picture that can be shown: corrupt image",
        ),
        (["FOLDER", "?"], "is no Hugging Face folder (no config.json in it)"),
        (["RUN", "?"], "it is a run's folder, whose model is"),
    ],
)
def test_what_chat_cannot_show_or_ask_is_one_sentence(
    arguments: list[str], sentence: str, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "hf").symlink_to(tiny_model)
    names = {"MODEL": tiny_model, "FOLDER": tmp_path, "RUN": tmp_path / "run"}
    done = CliRunner().invoke(app, ["chat", *(str(names.get(each, each)) for each in arguments)])
    assert sentence in str(done.exception)
