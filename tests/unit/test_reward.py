"""Reward parts on right, wrong and adversarial texts; reward files with faults."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import box_iou as torchvision_iou

from gspo_mm.advantage import group_advantages
from gspo_mm.config import AdvantageConfig
from gspo_mm.reward import RewardFileError, load_reward
from gspo_mm.reward.grounding import BoxArgs, box_iou, iou, parse_box
from gspo_mm.reward.part import PartType
from gspo_mm.reward.parts import PARTS
from gspo_mm.reward.pattern import extract_answer
from gspo_mm.reward.spec import parse_reward
from gspo_mm.reward.text import ExactArgs, FormatArgs, NumberArgs, exact, format_, number
from gspo_mm.types import Completion, Finish, Prompt, RolloutGroup

DIGITS = Path(__file__).parents[2] / "configs/rewards/digits.yaml"


def prompt(answer, task="digit", key="digits-000000/000007"):
    return Prompt(key=key, messages=(), images=(), answer=answer, task=task)


def completion(text, finish=Finish.STOP):
    return Completion.of_one_turn(token_ids=(1,), logprobs=(-0.5,), versions=(0,), finish=finish, text=text)


def score(text, answer, task="digit", reward=None):
    return (reward or load_reward(DIGITS)).score(prompt(answer, task), completion(text))


# --- parts
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer", "args", "value"),
    [
        ("7", 7, {}, 1),
        (" 7\n", 7, {}, 1),
        ("7", "7", {}, 1),
        ("+7", 7, {}, 1),
        ("-7", 7, {}, 0),
        ("-7", -7, {}, 1),
        ("007", 7, {}, 1),
        ("7.0", 7, {}, 1),
        ("8", 7, {}, 0),
        ("", 7, {}, 0),
        (".5", 0.5, {}, 1),
        ("0.1", 0.1, {}, 1),
        ("0.30000000000000004", 0.3, {}, 0),  # exact fractions, no float rounding
        ("1,234", 1234, {}, 1),
        ("1,234,567.5", "1234567.5", {}, 1),
        ("1234", "1,234", {}, 1),
        ("12,34", 1234, {}, 0),
        ("1,2345", 12345, {}, 0),
        ("7.05", 7, {"tolerance": 0.05}, 1),  # the tolerance itself is still inside
        ("7.0500001", 7, {"tolerance": 0.05}, 0),
        ("6.9", 7, {"tolerance": 0.2}, 1),
        ("7 or 8", 7, {}, 0),
        ("7, 8", 7, {}, 0),
        ("7 7", 77, {}, 0),
        ("7.", 7, {}, 0),
        ("7 apples", 7, {}, 0),
        ("seven", 7, {}, 0),
        ("7e0", 7, {}, 0),
        ("1e999999999", 7, {}, 0),
        ("nan", 7, {"tolerance": 1e300}, 0),
        ("inf", 7, {"tolerance": 1e300}, 0),
        ("0x7", 7, {}, 0),
        ("1_0", 10, {}, 0),
        ("7/1", 7, {}, 0),
        ("--7", -7, {}, 0),
        ("9" * 100_000, 7, {}, 0),  # Python refuses to parse it: a score, never an error
        ("٧", 7, {}, 0),  # Arabic-Indic seven
        ("７", 7, {}, 0),  # full-width seven
        ("⁷", 7, {}, 0),
        ("−7", -7, {}, 0),  # a minus sign that is not the hyphen
        ("True", 1, {}, 0),
    ],
)
def test_number(text, answer, args, value):
    assert number(text, answer, NumberArgs(**args)) == value


@pytest.mark.parametrize("answer", [None, True, "many", "", [7], {"n": 7}, math.nan, math.inf])
def test_number_refuses_an_answer_that_is_none(answer):
    with pytest.raises(ValueError, match="is no number"):
        number("7", answer, NumberArgs())


@pytest.mark.parametrize(
    ("text", "answer", "args", "value"),
    [
        ("Paris", "Paris", {}, 1),
        ("  Paris \n", "Paris", {}, 1),
        ("New   York", "New York", {}, 1),
        ("paris", "Paris", {}, 0),
        ("paris", "Paris", {"ignore_case": True}, 1),
        ("STRASSE", "Straße", {"ignore_case": True}, 1),
        ("Cafe\u0301", "Caf\u00e9", {}, 1),  # composed and decomposed é look the same
        ("Paris, London", "Paris", {}, 0),
        ("", "Paris", {}, 0),
        ("7", 7, {}, 1),
        ("7.0", 7, {}, 0),
        ("٧", 7, {}, 0),
    ],
)
def test_exact(text, answer, args, value):
    assert exact(text, answer, ExactArgs(**args)) == value


@pytest.mark.parametrize("answer", [None, True, "", "  ", [1], {}])
def test_exact_refuses_an_answer_that_is_no_text(answer):
    with pytest.raises(ValueError, match="no text or number"):
        exact("", answer, ExactArgs())


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<a>7</a>", 1),
        ("<a>7\n8</a>", 1),  # . matches line ends
        ("so <a>7</a>", 0),
        ("<a>7</a>.", 0),
        ("", 0),
    ],
)
def test_format_matches_the_whole_text(text, value):
    assert format_(text, None, FormatArgs(pattern="<a>.*</a>")) == value


BOX = [10, 20, 30, 40]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[10, 20, 30, 40]", 1),
        ("  [10,20,\n 30,40 ]  ", 1),
        ("[10.0, 20.0, 30.0, 40.0]", 1),
        ('{"bbox_2d": [10, 20, 30, 40], "label": "7"}', 1),
        ('[{"bbox_2d": [10, 20, 30, 40]}]', 1),
        ("[[10, 20, 30, 40]]", 1),
        ("```json\n[10, 20, 30, 40]\n```", 1),
        ("[10, 20, 30, 30]", 0.5),
        ("[20, 20, 40, 40]", 1 / 3),
        ("[0, 0, 1000000, 1000000]", 400 / 1e12),
        ("[30, 20, 50, 40]", 0),  # touching
        ("[100, 100, 120, 120]", 0),
        ("[30, 40, 10, 20]", 0),  # corners swapped
        ("[10, 20, 10, 40]", 0),  # no width
        ("[10, 40, 30, 40]", 0),
        ("[10, 20, 30]", 0),
        ("[10, 20, 30, 40, 50]", 0),
        ('["10", "20", "30", "40"]', 0),  # numbers as strings
        ('"[10, 20, 30, 40]"', 0),
        ("[[10, 20, 30, 40], [0, 0, 5, 5]]", 0),  # two boxes
        ("[10, 20, 30, 40] [0, 0, 5, 5]", 0),
        ('[{"bbox_2d": [10, 20, 30, 40]}, {"bbox_2d": [10, 20, 30, 40]}]', 0),
        ('{"bbox_2d": [0, 0, 5, 5], "bbox_2d": [10, 20, 30, 40]}', 0),  # JSON itself would keep the last
        ('{"box": [10, 20, 30, 40]}', 0),
        ("[true, 20, 30, 40]", 0),
        ("[NaN, 20, 30, 40]", 0),
        ("[-Infinity, -Infinity, Infinity, Infinity]", 0),
        ("[-1e400, -1e400, 1e400, 1e400]", 0),
        ("[-1e308, -1e308, 1e308, 1e308]", 0),
        ("[10, 20, 30, " + "9" * 100_000 + "]", 0),
        ("[10, 20, 30, " + "9" * 4_000 + "]", 0),  # JSON reads it, but it fits no float
        ("[" * 100_000, 0),
        ('{"bbox_2d":' * 50_000, 0),
        ("[١٠, 20, 30, 40]", 0),
        ("10, 20, 30, 40", 0),
        ("null", 0),
        ("", 0),
    ],
)
def test_box_iou(text, value):
    assert box_iou(text, BOX, BoxArgs()) == pytest.approx(value, abs=1e-15)


@pytest.mark.parametrize(
    "answer", [None, "[1, 2, 3, 4]", [1, 2, 3], [3, 4, 1, 2], [0, 0, 0, 5], {"bbox_2d": BOX}]
)
def test_box_iou_refuses_an_answer_that_is_no_box(answer):
    with pytest.raises(ValueError, match="is no box"):
        box_iou("[1, 2, 3, 4]", answer, BoxArgs())


coordinate = st.floats(-1e5, 1e5).map(lambda x: round(x, 3))
box = st.tuples(coordinate, coordinate, st.floats(0.01, 1e4), st.floats(0.01, 1e4)).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)


def test_a_box_around_everything_earns_nothing_where_an_overlap_is_asked_for():
    answer, everything = [32, 0, 64, 32], "[0, 0, 64, 64]"
    assert box_iou(everything, answer, BoxArgs()) == 0.25
    assert box_iou(everything, answer, BoxArgs(at_least=0.4)) == 0.0
    assert box_iou("[32, 0, 64, 16]", answer, BoxArgs(at_least=0.5)) == 0.5  # the bound itself is enough


@given(a=box, b=box, near=st.booleans())
def test_iou_equals_torchvision(a, b, near):
    if near:  # else most boxes are apart
        b = (a[0] + 0.1 * (b[2] - b[0]), a[1], a[2] + 0.1 * (b[2] - b[0]), a[3] + 0.2)
    tensors = [torch.tensor([x], dtype=torch.float64) for x in (a, b)]
    assert iou(a, b) == pytest.approx(torchvision_iou(*tensors).item(), abs=1e-12)
    assert iou(a, b) == iou(b, a)
    assert box_iou(json.dumps(a), list(a), BoxArgs()) == 1.0


@given(text=st.text(max_size=60) | st.text(alphabet='0123456789.,-+[]{}"bo_x2d: eENaInf', max_size=40))
def test_no_text_makes_a_part_fail(text):
    assert 0 <= number(text, 7, NumberArgs(tolerance=1.0)) <= 1
    assert 0 <= exact(text, "7", ExactArgs()) <= 1
    assert 0 <= box_iou(text, BOX, BoxArgs()) <= 1
    parsed = parse_box(text)
    assert parsed is None or (parsed[0] < parsed[2] and parsed[1] < parsed[3])


# --- extraction
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>7</answer>", "7"),
        ("I see <answer>\n 7 </answer>, surely", "7"),
        ("<answer>7</answer> so <answer> 7</answer>", "7"),  # the same answer twice is one answer
        ("<answer>7</answer><answer>8</answer>", None),
        ("<answer>7</answer>" * 3 + "<answer>8</answer>", None),
        ("<answer>8<answer>7</answer>", "8<answer>7"),  # no number
        ("<answer></answer>", ""),
        ("<answer>7", None),
        ("7", None),
    ],
)
def test_two_different_answers_are_none(text, answer):
    assert extract_answer(text, "<answer>(.*?)</answer>") == answer


def test_extraction_without_pattern_or_group():
    assert extract_answer(" 7 ", None) == "7"
    assert extract_answer("is it 7?", r"\d") == "7"
    assert extract_answer("is it 7 or 8?", r"\d") is None


# --- configs/rewards/digits.yaml
# -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer", "task", "value", "accuracy"),
    [
        ("<answer>7</answer>", 7, "digit", 1.0, 1.0),
        ("<answer>7</answer>", "7", "largest", 1.0, 1.0),
        (" <answer> 23 </answer>\n", 23, "sum", 1.0, 1.0),
        ("It is <answer>7</answer>", 7, "count", 0.9, 1.0),
        ("<answer>8</answer>", 7, "digit", 0.1, 0.0),
        ("<answer>7</answer> <answer>8</answer>", 7, "digit", 0.0, 0.0),
        ("<answer>7<answer>8</answer>", 7, "digit", 0.0, 0.0),
        ("7", 7, "digit", 0.0, 0.0),
        ("", 7, "digit", 0.0, 0.0),
        ("<answer>[12, 5, 30, 28]</answer>", [12, 5, 30, 28], "where", 1.0, 1.0),
        ("<answer>[12, 5, 30, 17]</answer>", [12, 5, 30, 28], "where", 0.9 * 12 / 23 + 0.1, 1.0),
        ("<answer>[12, 5, 30, 16]</answer>", [12, 5, 30, 28], "where", 0.9 * 11 / 23 + 0.1, 0.0),
        ("<answer>[30, 28, 12, 5]</answer>", [12, 5, 30, 28], "where", 0.1, 0.0),
        ("<answer>7</answer>", [12, 5, 30, 28], "where", 0.0, 0.0),
    ],
)
def test_the_digit_reward(text, answer, task, value, accuracy):
    result = score(text, answer, task)
    assert result.value == pytest.approx(value, abs=1e-11)
    assert result.accuracy == accuracy
    assert set(result.parts) == ({"box", "box_format"} if task == "where" else {"number", "format"})
    assert result.error is None


def test_a_misspelt_task_is_an_error_naming_prompt_task_and_file():
    with pytest.raises(RewardFileError, match=r"digits\.yaml: prompt digits-000000/000007 has task='colour'"):
        score("<answer>7</answer>", 7, "colour")


def test_a_completion_cut_off_is_judged_as_it_is():
    reward = load_reward(DIGITS)
    cut = reward.score(prompt(7), completion("<answer>7</answer> and", Finish.LENGTH))
    assert (cut.value, cut.error) == (0.9, None)


# --- reward files
# --------------------------------------------------------------------------------------------------


def build(*parts, **more):
    return parse_reward({"name": "test", "parts": list(parts), **more}, file="file.yaml")


def part(name="p", type="exact", **more):
    return {"name": name, "type": type, **more}


def test_the_reward_is_the_weighted_sum_and_weight_zero_only_measures():
    reward = build(
        part("a", weight=0.5),
        part("b", "number", weight=0.25),
        part("c", "format", weight=0, args={"pattern": "7"}),
    )
    result = score("7", 7, reward=reward)
    assert result.value == 0.75
    assert result.parts == {"a": 1.0, "b": 1.0, "c": 1.0}
    assert result.accuracy is None


def test_rewards_equal_on_paper_are_equal():
    """0.1 + 0.2 is not 0.3 in floating point; normalising the difference would make advantages of noise."""
    reward = build(
        *(
            part(n, "format", weight=w, args={"pattern": p})
            for n, w, p in [("a", 0.1, "x|y"), ("b", 0.2, "x"), ("c", 0.2, "y")]
        )
    )
    other = build(part("a", weight=0.3))
    first, second = score("x", "x", reward=reward).value, score("x", "x", reward=other).value
    assert first == second == 0.3


def test_a_part_may_override_the_extraction():
    reward = build(part("a"), part("b", extract="<b>(.*?)</b>"), extract="<a>(.*?)</a>")
    assert score("<a>1</a><b>2</b>", "1", reward=reward).parts == {"a": 1.0, "b": 0.0}
    assert score("<a>1</a><b>2</b>", "2", reward=reward).parts == {"a": 0.0, "b": 1.0}


@pytest.mark.parametrize(("accuracy", "value"), [(True, 0.0), (0.9, 0.0), (0.5, 1.0), (False, None)])
def test_accuracy_is_decided_by_the_marked_part(accuracy, value):
    reward = build(part("a", "box_iou", accuracy=accuracy), part("b", "format", args={"pattern": ".*"}))
    assert score("[10, 20, 30, 30]", BOX, reward=reward).accuracy == value


def test_a_part_that_fails_gives_no_reward_and_never_zero(monkeypatch):
    def boom(text, answer, args):
        if text == "bad":
            raise KeyError("oops")
        return 1.0

    monkeypatch.setitem(PARTS, "boom", PartType(judge=boom, args=ExactArgs))
    reward = build(part("fine"), part("broken", "boom"))
    completions = tuple(map(completion, ["x", "bad", "y"]))
    scores = tuple(reward.score(prompt("x"), each) for each in completions)
    failed = scores[1]
    assert failed.error == "part broken: KeyError: 'oops'"
    assert math.isnan(failed.value)
    assert failed.accuracy is None
    assert failed.parts == {"fine": 0.0}
    group = RolloutGroup(id=4, prompt=prompt("x"), prompt_ids=(1,), completions=completions, scores=scores)
    result = group_advantages([group], AdvantageConfig())
    assert (result.dead, result.failed) == (0, 0)
    assert result.live[0].advantages[1] == 0.0
    assert group_advantages([group], AdvantageConfig(), drop_failed=True).failed == 1


@pytest.mark.parametrize("value", [math.nan, 1.5, -0.1])
def test_a_part_that_leaves_the_unit_range_fails(value, monkeypatch):
    monkeypatch.setitem(PARTS, "odd", PartType(judge=lambda *_: value, args=ExactArgs))
    assert "outside [0, 1]" in (score("x", "x", reward=build(part(type="odd"))).error or "")


def test_a_faulty_answer_is_found_whatever_the_model_says():
    for text in ("<answer>7</answer>", "no idea", ""):
        assert "answer None is no number" in (score(text, None).error or "")


def test_a_text_without_an_answer_scores_zero_even_where_the_part_would_not(monkeypatch):
    monkeypatch.setitem(PARTS, "kind", PartType(judge=lambda *_: 1.0, args=ExactArgs))
    reward = build(part(type="kind"), extract="<a>(.*?)</a>")
    assert score("<a>x</a>", "x", reward=reward).value == 1.0
    for text in ("", "x", "<a></a>", "<a>x</a><a>y</a>"):
        assert score(text, "x", reward=reward).value == 0.0


FAULTS = [
    (None, "is empty"),
    ({}, "is empty"),
    (["a"], "no mapping"),
    ({"parts": [part()]}, "name is missing; add it"),
    ({"name": "x"}, "parts is missing; add it"),
    ({"name": "x", "parts": []}, "parts=[] is refused"),
    ({"name": "x", "parts": ["exact"]}, "parts.0='exact' is refused: write a mapping"),
    ({"name": "x", "parts": [{"type": "exact"}]}, "parts.0.name is missing"),
    ({"name": "x", "prts": 1, "parts": [part()]}, "prts=1 is unknown"),
    (
        {"name": "x", "combine": "mean", "parts": [part()]},
        "combine='mean' is refused: input should be 'sum' or 'product'",
    ),
    ({"name": "x", "extract": "(a", "parts": [part()]}, "extract='(a' is refused: not a regular expression"),
    ({"name": "x", "extract": "(a)(b)", "parts": [part()]}, "more than one group"),
    ({"name": "x", "parts": [part(extract="[")]}, "parts.p.extract='[' is refused"),
    (
        {"name": "x", "parts": [part(type="exakt")]},
        "parts.p.type='exakt' is unknown; use one of exact, normalised, number",
    ),
    ({"name": "x", "parts": [part(args={"tolerance": 1})]}, "parts.p.args.tolerance=1 is unknown"),
    (
        {"name": "x", "parts": [part(type="number", args={"tolerance": -1.0})]},
        "parts.p.args.tolerance=-1.0 is refused",
    ),
    (
        {"name": "x", "parts": [part(type="number", args={"tolerance": "1"})]},
        "parts.p.args.tolerance='1' is refused",
    ),
    ({"name": "x", "parts": [part(type="format")]}, "parts.p.args.pattern is missing"),
    (
        {"name": "x", "parts": [part(type="format", args={"pattern": "("})]},
        "parts.p.args.pattern='(' is refused",
    ),
    (
        {"name": "x", "parts": [part(type="format", extract="a", args={"pattern": "a"})]},
        "parts.p.extract='a' has no",
    ),
    ({"name": "x", "parts": [part(weight=0)]}, "weight=0, so every reward is 0"),
    ({"name": "x", "parts": [part(weight=-1.0)]}, "parts.p.weight=-1.0 is refused"),
    ({"name": "x", "parts": [part(weight=math.inf)]}, "parts.p.weight=inf is refused"),
    ({"name": "x", "parts": [part(weight="1")]}, "parts.p.weight='1' is refused"),
    (
        {"name": "x", "parts": [part(accuracy=2.0)]},
        "parts.p.accuracy=2.0 is refused: use true, false, or a threshold",
    ),
    ({"name": "x", "parts": [part(accuracy=0)]}, "parts.p.accuracy=0 is refused"),
    ({"name": "x", "parts": [part(tasks=[])]}, "parts.p.tasks=[] is refused"),
    ({"name": "x", "parts": [part(tasks="digit")]}, "parts.p.tasks='digit' is refused"),
    ({"name": "x", "parts": [part(), part()]}, "parts.p is there 2 times"),
    (
        {"name": "x", "parts": [part("a", accuracy=True), part("b", tasks=["t"], accuracy=True)]},
        "parts.a.accuracy and parts.b.accuracy are both set",
    ),
]


@pytest.mark.parametrize(("content", "message"), FAULTS, ids=[message for _, message in FAULTS])
def test_a_faulty_reward_file_is_one_sentence_naming_file_key_and_value(content, message, tmp_path):
    path = tmp_path / "reward.yaml"
    path.write_text("" if content is None else yaml.safe_dump(content))
    with pytest.raises(RewardFileError) as error:
        load_reward(path)
    assert message in str(error.value)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", [b"name: [", b"\xff\xfe\x00", b"name: a\nname: b\nparts: []", b"name: ${nowhere}"]
)
def test_a_file_that_is_no_yaml_is_one_sentence(content, tmp_path):
    path = tmp_path / "reward.yaml"
    path.write_bytes(content)
    with pytest.raises(RewardFileError, match=r"reward.yaml is not a valid YAML file: ") as error:
        load_reward(path)
    assert "\n" not in str(error.value)


def test_a_missing_reward_file_is_named():
    with pytest.raises(RewardFileError, match=r"nowhere\.yaml does not exist"):
        load_reward("nowhere.yaml")


def test_parts_for_different_tasks_may_each_decide_accuracy():
    reward = build(
        part("a", tasks=["digit"], accuracy=True), part("b", "number", tasks=["sum"], accuracy=True)
    )
    assert score("7.0", 7, "digit", reward).accuracy == 0.0
    assert score("7.0", 7, "sum", reward).accuracy == 1.0
