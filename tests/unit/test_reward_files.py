"""Reward files as a researcher uses them: shipped ones, their cases, rules of combination, own functions, fuzz."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from gspo_mm.cli import app
from gspo_mm.commands.rescore import check_cases, load_answers, rewards_of
from gspo_mm.reward import RewardFileError, load_reward
from gspo_mm.reward.cases import Case, Sample
from gspo_mm.reward.math import MathArgs, math_
from gspo_mm.reward.parts import PARTS, weighted_product
from gspo_mm.reward.pattern import SlowPatternError, boxed, extract_answer, matches
from gspo_mm.reward.spec import parse_reward
from gspo_mm.rollout.saved import save_rollouts
from gspo_mm.types import GspoError, RolloutGroup

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted((CONFIGS / "rewards").glob("*.yaml"))
RUNNER = CliRunner()


def build(*parts, **more):
    return parse_reward({"name": "test", "parts": list(parts), **more}, file="file.yaml")


def score(reward, response, answer="x", **more):
    sample = Sample(answer=answer, response=response, task="t", **more)
    return reward.score(sample.prompt("s"), sample.completion())


EXACT = {"name": "exact", "type": "exact", "accuracy": True}
FORMAT = {"name": "format", "type": "format", "weight": 0.5, "args": {"pattern": "[a-z]*"}}
OVERLONG = {"name": "overlong", "type": "overlong", "args": {"max_tokens": 100, "cache": 50}}


# --- the files that come with the project


# the judge's are asked of a judge: test_judge.py
@pytest.mark.parametrize("path", [path for path in FILES if path.stem != "judge"], ids=lambda path: path.stem)
def test_the_cases_of_a_shipped_file_pass(path):
    reward = load_reward(path)
    checked = check_cases(path, reward.spec.cases)
    assert [f"{c.case.response[:60]!r}: {c.faults}" for c in checked if c.faults] == []
    assert len(checked) >= 20
    tasks = {task for part in reward.spec.parts for task in part.tasks or ()}
    assert {c.case.task for c in checked} == tasks, "each task has cases"
    for task in tasks:
        values = [c.score.value for c in checked if c.case.task == task]
        assert max(values) == 1
        assert min(values) <= 0.3


def test_the_readme_names_every_part_and_its_example_passes(tmp_path):
    text = (CONFIGS / "rewards/README.md").read_text()
    for name in PARTS:
        assert f"`{name}`" in text, f"{name} is not explained"
    example = tmp_path / "example.yaml"
    example.write_text(text.split("```yaml\n")[1].split("```")[0])
    checked = check_cases(example, load_reward(example).spec.cases)
    assert checked
    assert not [c.faults for c in checked if c.faults]


# --- combination


def test_a_closed_gate_takes_the_reward_and_the_accuracy():
    reward = build(EXACT, FORMAT, gate=["format"])
    right, shouted = score(reward, "x"), score(reward, "X", answer="X")
    assert (right.value, right.accuracy) == (1.5, 1.0)
    assert (shouted.value, shouted.accuracy) == (0.0, 0.0)
    assert shouted.parts == {"exact": 1.0, "format": 0.0}, "parts are shown as they are"


def test_a_closed_gate_is_no_way_round_a_penalty():
    reward = build(EXACT, FORMAT, OVERLONG, gate=["format"])
    assert score(reward, "X", tokens=75).value == -0.5
    assert score(reward, "x", tokens=75).value == 1.0
    assert score(reward, "x", tokens=200).value == 0.5


def test_a_gate_of_another_task_is_open():
    gate = FORMAT | {"tasks": ["other"]}
    assert score(build(EXACT, gate, gate=["format"]), "X", answer="X").value == 1.0


def test_a_product_is_of_powers():
    assert weighted_product([0.5, 0.25], [2, 0.5]) == 0.125
    assert weighted_product([0.0, 1.0], [0.0, 1.0]) == 1.0, "weight 0 only measures"
    reward = build(EXACT, FORMAT, combine="product")
    assert score(reward, "x").value == 1.0
    assert score(reward, "y").value == 0.0


def test_counting_tokens_without_tokens_is_no_score():
    result = score(build(OVERLONG), "some text")
    assert math.isnan(result.value)
    assert "give the sample its `tokens`" in (result.error or "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": ["fromat"]}, "gate='fromat' names no part; use one of exact, overlong"),
        ({"combine": "product"}, "parts.overlong.type=overlong is a penalty"),
        ({"cases": [{"answer": 1, "response": "1", "task": "t"}]}, "cases.0.score is missing"),
        (
            {"cases": [{"answer": 1, "response": "1", "task": "t", "score": 1, "sore": 1}]},
            "cases.0.sore=1 is unknown",
        ),
        (
            {"parts": [EXACT | {"python": "math:sqrt"}]},
            "a part has a type or a python function; give it one",
        ),
        ({"parts": [{"name": "none"}]}, "a part has a type or a python function; give it one"),
        ({"parts": [{"name": "p", "type": "overlong", "args": {"max_tokens": 1, "cache": 2}}]}, "cache=2 is above"),
        ({"parts": [{"name": "p", "type": "choice", "args": {"letters": "a"}}]}, "args.letters='a' is refused"),
        ({"parts": [{"name": "p", "type": "json_schema", "args": {"schema": {"type": "x"}}}]}, "no JSON schema"),
        ({"parts": [{"name": "p", "type": "number", "args": {"units": {"m2": 1}}}]}, "reads as part of a number"),
    ],
)  # fmt: skip
def test_a_fault_is_one_sentence_with_key_and_value(change, message):
    with pytest.raises(RewardFileError, match=r"file\.yaml: ") as error:
        parse_reward({"name": "x", "parts": [EXACT, OVERLONG]} | change, file="file.yaml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# --- extraction and patterns


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{ 1 }", "1"),
        (r"\boxed{1} and \boxed{2}", None),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{3}}", r"\boxed{3}"),
        (r"\boxed{1", None),
        (r"\boxed 1", None),
        ("1", None),
    ],
)
def test_boxed(text, answer):
    assert extract_answer(text, "boxed") == answer


@pytest.mark.timeout(30)
def test_boxed_takes_one_walk_over_the_text():
    assert boxed("\\boxed{" * 200_000) == []
    assert len(boxed("\\boxed{1}" * 200_000)) == 200_000


@pytest.mark.timeout(30)
def test_a_pattern_without_end_is_a_failure_and_no_zero():
    """Python's own `re` would be at it for years."""
    with pytest.raises(SlowPatternError, match="took more than 1 s on a text of 51 characters"):
        matches("(a|aa)+", "a" * 50 + "b")
    reward = build(EXACT | {"extract": "(?:a|aa)+c"})
    assert "took more than" in (score(reward, "a" * 60).error or "")


# --- own functions

MINE = '''
def close(text, prompt, completion, *, within=1):
    """Right answers are near."""
    if text == "boom":
        raise KeyError("oops")
    return 0.0 if text is None else float(abs(float(text) - prompt.answer) <= within)

def minus(text, prompt, completion):
    return -1.0

def words(text, prompt, completion):
    return "much"

LIMIT = 3
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_rewards", None)


def own(function, **args):
    return {"name": "own", "python": function, "args": args, "extract": "<a>(.*?)</a>"}


@pytest.mark.usefixtures("mine")
def test_a_function_of_the_user_is_a_part():
    reward = build(own("my_rewards:close", within=2))
    assert score(reward, "<a>9</a>", answer=7).value == 1.0
    assert score(reward, "<a>10</a>", answer=7).value == 0.0
    assert score(reward, "<a>7</a><a>8</a>", answer=7).value == 0.0, "two answers are None"
    assert score(reward, "<a>boom</a>", answer=7).error == "part own: KeyError: 'oops'"
    assert score(build(own("my_rewards:minus")), "x").value == -1.0
    assert "no number" in (score(build(own("my_rewards:words")), "x").error or "")
    product = build(own("my_rewards:minus"), combine="product")
    assert "outside [0, 1]" in (score(product, "x").error or "")


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("part", "message"),
    [
        (own("my_rewards"), "python='my_rewards' is refused: write it as package.module:function"),
        (own("my_rewards:far"), "module my_rewards has no far"),
        (own("no_such_module:far"), "name its folder in PYTHONPATH"),
        (own("my_rewards:LIMIT"), "it is no function"),
        (own("my_rewards:close", witin=2), "unexpected keyword argument 'witin'"),
    ],
)
def test_a_function_that_cannot_be_used_is_one_sentence(part, message):
    with pytest.raises(RewardFileError, match=r"file.yaml: parts.own.python=") as error:
        build(part)
    assert message in str(error.value)


# --- commands


def command(*args):
    return RUNNER.invoke(app, ["reward", *map(str, args)])


def test_check_passes_or_names_what_differs(tmp_path):
    path = tmp_path / "mine.yaml"
    case = {"answer": "x", "response": "x", "task": "t", "score": 1.0}
    content = {"name": "mine", "parts": [EXACT], "cases": [case]}
    path.write_text(yaml.safe_dump(content))
    result = command("check", path)
    assert result.exit_code == 0
    assert "1 cases pass" in result.output
    content["cases"] = [
        case,
        case | {"response": "y", "accuracy": True, "parts": {"exact": 1.0, "other": 0.0}},
    ]
    path.write_text(yaml.safe_dump(content))
    result = command("check", path, CONFIGS / "rewards/digits.yaml")
    assert result.exit_code == 1
    shown = " ".join(result.output.replace("│", " ").split())
    for word in ("score 0, not 1", "exact 0, not 1", "2 cases, 1 differ"):
        assert word in shown
    content["cases"] = []
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(RewardFileError, match=r"cases=\[\] checks nothing"):
        RUNNER.invoke(app, ["reward", "check", str(path)], catch_exceptions=False)


def test_a_case_that_fails_differs(tmp_path):
    path = tmp_path / "file.yaml"
    path.write_text(yaml.safe_dump({"name": "test", "parts": [EXACT]}))
    checked = check_cases(
        path,
        [
            Case(answer=None, response="x", task="t", score=0.0),
            Case(answer="a", response="a", task="t", score=1),
        ],
    )
    assert "answer None is no text" in checked[0].faults[0]
    assert checked[1].faults == []


def test_samples_are_scored_and_each_part_shown(tmp_path):
    path = tmp_path / "samples.jsonl"
    lines = [
        {"answer": 7, "response": "<answer>7</answer>", "task": "digit"},
        {"answer": 7, "response": "7", "task": "digit"},
        {"answer": [1, 2, 3, 4], "response": "<answer>[1, 2, 3, 4]</answer>", "task": "where", "tokens": 4},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    for file in ("rewards/digits.yaml", "quickstart.yaml"):
        result = command(CONFIGS / file, "--input", path)
        assert result.exit_code == 0, result.output
        for word in ("number", "box", "format", "line 1", "mean of task", "where", "0.6667"):
            assert word in result.output
    path.write_text(json.dumps({"answer": None, "response": "x", "task": "digit"}))
    result = command(CONFIGS / "rewards/digits.yaml", "--input", path)
    assert result.exit_code == 1
    assert "line 1 failed: part number: ValueError: answer None is no number" in result.output


def test_rollouts_of_a_trainer_are_scored_without_their_images(tmp_path):
    reward = load_reward(CONFIGS / "rewards/grounding.yaml")
    case = reward.spec.cases[0]
    group = RolloutGroup(
        id=1, prompt=case.prompt("shard/7"), prompt_ids=(1,), completions=(case.completion(),) * 2
    )
    scores = (reward.score(group.prompt, group.completions[0]),) * 2
    saved = save_rollouts(tmp_path, 3, [replace(group, scores=scores)])
    for image in (tmp_path / "rollouts/images").iterdir():
        image.unlink()
    answers = list(load_answers(saved))
    assert [answer.saved.value for answer in answers if answer.saved] == [1.0, 1.0]
    result = command(CONFIGS / "rewards/grounding.yaml", "--input", saved, "--rows", 1)
    assert result.exit_code == 0
    assert "shard/7" in result.output
    assert "1 more samples" in result.output


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is no sample"),
        ("[1]", "it holds no JSON object"),
        ('{"answer": 1, "response": "x"}', "task: field required"),
        ('{"answer": 1, "response": 1, "task": "t"}', "response: input should be a valid string"),
        ('{"completions": []}', "key 'prompt' is missing"),
    ],
)
def test_a_line_that_is_no_sample_is_named(line, message, tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text('{"answer": 1, "response": "x", "task": "t"}\n' + line)
    with pytest.raises(GspoError, match=r"samples.jsonl: line 2 is no sample") as error:
        list(load_answers(path))
    assert message in str(error.value)


def test_a_config_names_the_reward_files_of_its_sources(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, pattern in (("a", "x"), ("b", "y")):
        part = {"name": name, "type": "format", "args": {"pattern": pattern}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"name": name, "parts": [part]}))
    config = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    config["data"]["train"] = [
        {"name": "maps", "shards": ["maps.tar"], "reward": "b.yaml"},
        {"name": "c", "shards": ["c.tar"]},
    ]
    config["reward"] = {"file": "a.yaml"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    sample = Sample(answer=1, response="y", task="t")
    groups = [
        RolloutGroup(
            id=i,
            prompt=replace(sample.prompt("s"), source=source),
            prompt_ids=(),
            completions=(sample.completion(),),
        )
        for i, source in enumerate(["maps", "c"])
    ]
    save_rollouts(tmp_path, 1, groups)
    result = command(tmp_path / "config.yaml", "--input", tmp_path / "rollouts/step-00000001.jsonl.gz")
    assert result.exit_code == 0, result.output
    with closing(rewards_of(tmp_path / "config.yaml")) as rewards:
        assert [dict(g.scores[0].parts) for g in rewards.score_groups(groups)] == [{"b": 1.0}, {"a": 0.0}]
    with pytest.raises(RewardFileError, match="does not exist"):
        rewards_of(CONFIGS / "nowhere.yaml")


# --- any text

FUZZ = int(os.environ.get("GSPO_FUZZ", "60"))  # texts for each part; GSPO_FUZZ=10000 for a long look
OWN = [name for name, kind in PARTS.items() if kind.judge]  # services are others'

ANSWERS = {
    "number": 7, "count": 7, "box_iou": [1, 2, 3, 4], "point_in_box": [1, 2, 3, 4], "choice": "B",
    "grounding_f1": [{"bbox_2d": [1, 2, 3, 4], "label": "a"}], "math": r"x^2+\frac{1}{2}", "set_f1": ["a", "b"],
}  # fmt: skip
ARGS = {
    "number": {"units": {"%": 0.01, "$": 1}, "unicode_digits": True},
    "choice": {"options": "options"},
    "format": {"pattern": r"\s*<a>.*</a>"},
    "language": {"scripts": ["Latin"]},
    "overlong": {"max_tokens": 9, "cache": 3},
    "json_schema": {"schema": {"type": "object", "properties": {"a": {"type": "string", "pattern": "^a+$"}}}},
}
WORDS = [
    "\\frac", "\\sqrt", "\\boxed", "\\sin", "\\pi", "\\left(", "\\right)", "\\text", "\\cdot", "\\{", "\\}", "\\infty",
    "\\log", "^", "_", "{", "}", "(", ")", "[", "]", "=", "<", "+", "-", "*", "/", "%", "$", "|", ",", ".", ":", '"',
    "1", "2", "99", "0", "x", "y", "e", "i", "A", "B", "iron", "bbox_2d", "label", "a", " ", "\n", "\u0663", "\u2212",
    "\ud7ff", "\x00", "e\u0301", "null", "NaN", "1e999", "<answer>", "</answer>", "```", "```json", "\u221a", "not",
]  # fmt: skip
ANY_TEXT = st.text(max_size=80) | st.lists(st.sampled_from(WORDS), max_size=25).map("".join)

ANY_ANSWER = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.lists(ANY_TEXT, max_size=2) | ANY_TEXT
)


def one_of(name):
    part = {"name": "p", "type": name, "args": ARGS.get(name, {})}
    return build(part)


@pytest.mark.parametrize("name", OWN)
@settings(deadline=10_000, max_examples=FUZZ)
@given(text=ANY_TEXT)
def test_no_text_makes_a_part_fail_or_hang(name, text):
    answer = ANSWERS.get(name, "ab")
    result = score(one_of(name), text, answer, tokens=5, meta={"options": ["iron", "B", "a b"]}, size=[9, 9])
    assert result.error is None
    assert -1.0 <= result.value <= 1.0


@pytest.mark.parametrize("name", OWN)
@pytest.mark.timeout(60)
def test_no_very_long_text_makes_a_part_fail_or_hang(name):
    reward = one_of(name)
    for word in WORDS:
        text = word * (200_000 // len(word))
        result = score(
            reward, text, ANSWERS.get(name, "ab"), tokens=5, meta={"options": ["iron", "B", "a b"]}
        )
        assert result.error is None, word


@settings(deadline=10_000, max_examples=FUZZ)
@given(text=ANY_TEXT, answer=ANY_ANSWER)
def test_no_answer_of_the_data_ends_a_run(text, answer):
    """It is a score or a failure, and both are counted."""
    reward = build(*[{"name": name, "type": name, "args": ARGS.get(name, {})} for name in OWN])
    result = score(reward, text, answer, tokens=5, meta={"options": ["iron", "B", "a b"]}, size=[9, 9])
    assert math.isnan(result.value) == (result.error is not None)


def test_mathematics_is_judged_in_threads():
    """math-verify's own time limits are signals, which only the main thread may set."""
    found = []
    pairs = [(rf"\frac{{{i}}}{{7}}", f"{2 * i}/14") for i in range(1, 9)]
    threads = [
        threading.Thread(target=lambda pair=pair: found.append(math_(*pair, MathArgs()))) for pair in pairs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [1.0] * 8
