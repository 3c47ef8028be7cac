"""The first commands of somebody new: init, eval with its answers, chat."""

import json
import re
from pathlib import Path
from statistics import fmean

import pytest
from typer.testing import CliRunner

from gspo_mm.cli import app
from gspo_mm.commands.init import Facts, reward_text
from gspo_mm.config import load_config
from gspo_mm.data.places import expand_shards
from gspo_mm.data.shards import read_shard
from gspo_mm.observe.metrics import read_metrics
from gspo_mm.plan.setup import job_of
from gspo_mm.plan.step import plan_of
from gspo_mm.reward.spec import load_reward
from gspo_mm.types import GspoError
from tests.e2e.conftest import gspo_mm


@pytest.fixture(scope="module")
def evaluated(
    short_config: Path, short_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, float], Path]:
    """What `eval --save` prints of the run's export, and its file."""
    saved = tmp_path_factory.mktemp("evaluated") / "new" / "answers.jsonl"
    done = gspo_mm("eval", str(short_config), f"model.path={short_run / 'hf'}", "--save", str(saved))
    return json.loads(done.stdout), saved


def test_eval_of_the_export_equals_the_runs_last_evaluation(
    evaluated: tuple[dict[str, float], Path], short_run: Path
) -> None:
    assert evaluated[0]["eval/accuracy"] == read_metrics(short_run)[-1]["eval/accuracy"]


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
    evaluated: tuple[dict[str, float], Path], short_run: Path, digit_shards: Path, tmp_path: Path
) -> None:
    (shard,) = expand_shards([str(digit_shards / "validation-*.tar")])
    asked = next(iter(read_shard(shard)))
    wanted = json.loads(evaluated[1].read_text().splitlines()[0])
    assert wanted["key"].endswith(asked["__key__"])
    (tmp_path / "digit.png").write_bytes(asked.get("png") or asked["0.png"])
    (message,) = json.loads(asked["json"])["messages"]
    question = next(part["text"] for part in message["content"] if part["type"] == "text")
    command = ["chat", str(short_run / "hf"), "--max-new-tokens", "6", "--image", str(tmp_path / "digit.png")]
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


@pytest.fixture(scope="module")
def made(tiny_model: Path, digit_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config that init writes for the digits, without a reward file."""
    out = tmp_path_factory.mktemp("init") / "my.yaml"
    done = CliRunner().invoke(
        app, ["init", str(out), "--model", str(tiny_model), "--data", str(digit_shards)]
    )
    assert done.exit_code == 0, done.output
    assert f"next: gspo-mm preflight {out} --all" in done.stdout
    return out


def test_preflight_takes_what_init_wrote_as_it_is(made: Path) -> None:
    """Its reward file gives every reference answer of the digits all that it has."""
    said = gspo_mm("preflight", str(made), "--all").stdout
    assert "reference answers: 240 of 240 samples have one" in said
    assert "; 0 of them are wrong" in said
    assert "the first 16 prompts can be used" in said


def test_a_config_of_init_trains(made: Path, short_config: Path, tmp_path: Path) -> None:
    """With rewards that random weights earn, too."""
    letters = f"reward.file={short_config.parent / 'reward.yaml'}"
    gspo_mm("train", str(made), f"run.dir={tmp_path}", letters, "train.steps=1", "train.eval_prompts=8")
    (run,) = tmp_path.iterdir()
    assert read_metrics(run)[-1]["step"] == 1
    config = load_config(made)
    longest = read_metrics(run)[-1]["length/max"]
    assert longest <= config.rollout.sampling.max_new_tokens < config.data.max_prompt_tokens


def test_init_for_gpus_writes_a_layout_that_is_planned_to_fit(
    made: Path, tiny_model: Path, digit_shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "gpus.yaml"
    command = ["init", str(out), "--model", str(tiny_model), "--data", str(digit_shards)]
    done = CliRunner().invoke(app, [*command, "--gpus", "16", "--gpu", "h200"])
    assert done.exit_code == 0, done.output
    config = load_config(out, any_world=True)
    assert config.rollout.sglang.servers * config.rollout.sglang.tp == 8
    assert config.loss == load_config(made).loss
    plan = plan_of(job_of(config, nodes=2, rollout_nodes=0, per_node=8, gpu="h200"))
    assert plan.fits
    again = CliRunner().invoke(app, [*command, "--reward", "r.yaml"])
    assert f"{out} exists; choose another name, or pass --force" in str(again.exception)
    odd = CliRunner().invoke(app, [*command, "--force", "--gpus", "12"])
    assert "--gpus 12 is no number of whole nodes of 8" in str(odd.exception)


def test_init_chooses_a_part_for_each_kind_of_answer(tmp_path: Path) -> None:
    facts = Facts(samples=4, prompts=[1] * 4)
    facts.answers |= {"n": [3, "4.5", "-1"], "w": ["a", 3], "b": [[1, 2, 3, 4]], "t": ["<answer>7</answer>"]}
    facts.answers |= {"c": ["A", "(C)"], "m": [r"\frac{1}{2}", 3], "v": [["cat", "a cat"], "dog"]}
    facts.answers |= {"s": ["[1, 2, 3, 4]"], "d": [[[1, 2, 3, 4], [5, 6, 7, 8]], [1, 2, 3, 4], []]}
    facts.stated.update({"<answer>(.*?)</answer>": 3})
    (tmp_path / "r.yaml").write_text(reward_text(facts, tmp_path / "r.yaml"))
    spec = load_reward(tmp_path / "r.yaml").spec
    assert [(part.name, part.type, part.tasks) for part in spec.parts] == [
        ("number", "number", ["n", "t"]),
        ("words", "normalised", ["w", "v"]),
        ("box", "box_iou", ["b", "s"]),
        ("choice", "choice", ["c"]),
        ("math", "math", ["m"]),
        ("boxes", "grounding_f1", ["d"]),
        ("format", "format", ["n", "w", "t", "c", "m", "v"]),
        ("box_format", "format", ["b", "s"]),
    ]
    pattern = spec.parts[-1].args["pattern"]
    given = [
        "[1, 2, 3, 4]",
        '{"bbox_2d": [0.5,-1, 3, 4]}',
        "[[1, 2, 3, 4]]",
        "[1, 2, 3]",
        "[1, 2, 3, 4, 5]",
        "7",
    ]
    formed = [bool(re.fullmatch(pattern, f"Here: <answer>{text}</answer>\n")) for text in given]
    assert formed == [True, True, True, False, False, False]
    assert spec.extract == "<answer>(.*?)</answer>"
    facts.answers["two"] = ["<answer>1</answer><answer>2</answer>"]
    with pytest.raises(GspoError, match=r"task two: .* states 2 different answers; correct it in the data"):
        reward_text(facts, tmp_path / "r.yaml")
    del facts.answers["two"]
    facts.answers["o"] = [{"a": 1}]
    with pytest.raises(GspoError, match=r"task o has answers such as .*, for which no part is chosen"):
        reward_text(facts, tmp_path / "r.yaml")
