"""What data sets bring as right answers: how parts read them, and what is a fault of the data."""

from __future__ import annotations

import logging
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from gspo_mm.commands.rescore import Answer, show_scores
from gspo_mm.commands.tables import table_console
from gspo_mm.config import RewardConfig, parse_config
from gspo_mm.evaluate import describe_accuracy, evaluate
from gspo_mm.inputs import check_answers
from gspo_mm.reward.choice import ChoiceArgs, choice
from gspo_mm.reward.math import MathArgs, math_
from gspo_mm.reward.rewards import check_failures, load_rewards
from gspo_mm.reward.spec import RewardFileError, parse_reward
from gspo_mm.types import Completion, DataError, Finish, GspoError, Prompt, RolloutGroup, Score
from tests.tars import image_bytes, record, write_tar


def completion(text: str) -> Completion:
    return Completion.of_one_turn(
        token_ids=(1,), logprobs=(-0.5,), versions=(0,), finish=Finish.STOP, text=text
    )


def prompt(answer, *, task="t", key="shard.tar/000001", meta=None) -> Prompt:
    return Prompt(key=key, messages=(), images=(), answer=answer, task=task, meta=meta or {})


def one_part(kind: str, *, extract="<answer>(.*?)</answer>", args=None):
    part = {"name": "p", "type": kind, "args": args or {}}
    return parse_reward({"name": "n", "extract": extract, "parts": [part]}, file="file.yaml")


# --- math


@pytest.mark.parametrize(
    ("text", "answer", "value"),
    [
        # sign and magnitude
        (r"9.1\times10^{-31}", r"1.6\times10^{-19}", 0),
        (r"-1.6\times10^{-19}", r"1.6\times10^{-19}", 0),
        ("1.6e-19", r"1.6\times10^{-19}", 1),
        (r"1.6 \cdot 10^{-19}", "1.6e-19", 1),
        ("1.6×10⁻¹⁹", r"1.6\times10^{-19}", 1),
        (r"0.16 \times 10^{-18}", r"1.6\times10^{-19}", 1),
        ("0", r"1.6\times10^{-19}", 0),
        (r"q = 9.1\times10^{-31}", r"q = 1.6\times10^{-19}", 0),
        (r"(9.1\times10^{-31}, 2)", r"(1.6\times10^{-19}, 2)", 0),
        (r"x < 9.1\times10^{-31}", r"x < 1.6\times10^{-19}", 0),
        (r"9.1\times10^{-31}x", r"1.6\times10^{-19}x", 0),
        (r"\sqrt{2}\cdot10^{-12}", r"\sqrt{3}\cdot10^{-12}", 0),
        ("12000024", "12000023", 0),
        (r"6.02\times10^{23}", 6.02e23, 1),
        # numbers of JSON
        ("0.00005", 0.00005, 1),
        (r"5\times10^{-5}", 5e-05, 1),
        ("-2.281718", 1e-05, 0),
        ("10000000000000000", 1e16, 1),
        ("7", 7, 1),
        ("7.0", 7, 1),
        ("-0.25", -0.25, 1),
        # units
        (r"5\text{ cm}", r"5\text{ m}", 0),
        (r"5\text{ meters}", r"5\,\mathrm{m}", 1),
        ("5", r"5\text{ m}", 1),
        ("5 cm", "5 kg", 0),
        (r"12\text{ cm}^2", r"12\text{ cm}^{2}", 1),
        (r"12\text{ cm}^3", r"12\text{ cm}^{2}", 0),
        ("12 cm²", r"12\mbox{ cm}^2", 1),
        (r"30^\circ", r"30\text{ rad}", 0),
        ("5 €", r"\$5", 0),
        (r"5\text{ meters per second}", r"5\text{ m/s}", 1),
        (r"5\text{ m/s}", r"5\text{ m/s}^2", 0),
        (r"5\text{ A}", r"5\text{ V}", 0),
        (r"5\text{ sec}", r"5\text{ s}", 1),
        (r"5^\circ", r"5^\circ\text{C}", 0),
        ("5", "5 m", 1),
        ("5m", "5 m", 1),
        ("5m", "5 cm", 0),
        (r"1.6\times10^{-19}", r"1.6\times10^{-19}\text{ C}", 1),
        (r"1.6\times10^{-19}\text{ J}", r"1.6\times10^{-19}\text{ C}", 0),
        (r"0.5\text{ tesla}", "0.5 T", 1),
        (r"3\ \mathrm{m\,s^{-1}}", r"3\ \mathrm{m/s}", 1),
        (r"3\ \mathrm{m\,s^{-2}}", r"3\ \mathrm{m/s}", 0),
        ("9.8", "9.8 m/s^2", 1),
        ("8.31", r"8.31\ \mathrm{J/(mol\cdot K)}", 1),
        (r"8.31\text{ J K}^{-1}\text{ mol}^{-1}", r"8.31\ \mathrm{J/(mol\cdot K)}", 1),
        (r"8.31\ \mathrm{J\,mol/K}", r"8.31\ \mathrm{J/(mol\cdot K)}", 0),
        ("5", r"5\,\text{N}\cdot\text{m}", 1),
        (r"10\text{ ohms}", r"10\ \Omega", 1),
        (r"10\ \text{k}\Omega", r"10\ \Omega", 0),
        ("5", r"5\ \mu\mathrm{F}", 1),
        (r"5\text{ μF}", r"5\ \mu\mathrm{F}", 1),
        (r"5\text{ F}", r"5\ \mu\mathrm{F}", 0),
        (r"\sigma+\mu", r"\mu+\sigma", 1),
        ("2", r"2\mu", 0),
        (r"5\text{ degrees Celsius}", r"5^\circ\text{C}", 1),
        (r"5\text{ degrees Fahrenheit}", r"5^\circ\text{C}", 0),
        # a letter right after a number is a variable
        ("5m", "5", 0),
        (r"3\text{x}", "3", 0),
        ("2xy", "2", 0),
        (r"3\sin x", "3", 0),
        # what is counted
        ("5", r"5\text{ apples}", 1),
        ("5 people", "5", 1),
        ("5", "5 apples", 1),
        (r"5\text{ pears}", r"5\text{ apples}", 0),
        # other words are part of the answer
        (r"3\text{ not }", "3", 0),
        (r"3\text{ is wrong}", "3", 0),
        ("3 maybe", "3", 0),
        (r"3\text{ isn't}", "3", 0),
        (r"\text{not }3", "3", 0),
        (r"3\text{ or so}", "3", 0),
        (r"50\text{ percent off}", "50", 0),
        (r"3\text{ half}", "3", 0),
        # words that are part of the number
        (r"3\text{ million}", "3", 0),
        ("3", r"3\text{ million dollars}", 0),
        (r"3\text{ million dollars}", "3000000", 1),
        (r"\$3\text{ million}", "3,000,000", 1),
        (r"\frac{1}{2}\text{ thousand}", "500", 1),
        # number bases
        ("204", "204_5", 1),
        (r"204_{\text{five}}", r"204_{\text{six}}", 0),
        ("204_6", "204_5", 0),
        ("54", "204_5", 0),
        # other scripts
        ("平行", r"\text{平行}", 1),
        ("垂直", "平行", 0),
        ("是", "不是", 0),
        ("да", "Да", 1),
        ("нет", "да", 0),
        ("5", "5个", 1),
        ("5厘米", r"5\text{厘米}", 1),
        ("5厘米", "5米", 0),
        ("5不", "5", 0),
        ("28 percent", r"28\%", 1),
        ("0.28", r"28\%", 1),
        (r"\frac{28}{100}", "28", 0),
        # looks
        (r"\$16,386.20", r"\$16,\!386.20", 1),
        ("16386.20", r"\$16,\!386.20", 1),
        (r"14{,}916", "14916", 1),
        (r"\dfrac{3}{4}.", "0.75", 1),
        (r"3\frac{1}{2}", "3.5", 1),
        ("3 1/2", r"\frac{7}{2}", 1),
        ("odd", r"\text{odd}", 1),
        (r"\text{parallel}", "parallel", 1),
        (r"\mathbf{no}", "No", 1),
        (r"\mathrm{Yes}", "Yes", 1),
        ("even", r"\text{odd}", 0),
        ("No", "Yes", 0),
        (r"(B)", r"\text{(B)}", 1),
        ("x=5", "5", 1),
        ("5", "x=5", 1),
        ("y=5", "x=5", 0),
        ("14/3", r"x=-5, p=\frac{14}{3}", 0),
        (r"S_1 : S = 7 : 32", "7:32", 1),
        ("7:32", "S_1:S=7:32", 1),
        ("7:31", "S_1:S=7:32", 0),
        # of an equation the last side, where the answer is none
        ("2+3=5", "5", 1),
        (r"\frac{a}{b}=\frac{6}{4}=1.5", "1.5", 1),
        ("5=2+4", "5", 0),
        ("0", "a+3z=0", 0),
        # values with names are a tuple
        ("x=1,y=2", "(1,2)", 1),
        ("(1,2)", "x=1, y=2", 1),
        ("(2,1)", "x=1, y=2", 0),
        ("(1,2)", "y=2, x=1", 1),
        ("y=2,x=1", "(1,2)", 1),
        ("y=1,x=2", "(1,2)", 0),
        ("1, 2", "x=1, y=2", 1),
        ("2, 1", "x=1, y=2", 0),
        ("2, 1", "x_1=1, x_2=2", 1),
        ("(7,2),(5,2)", "p=5,q=2;p=7,q=2", 1),
        ("p=7,q=2;p=5,q=2", "p=5,q=2;p=7,q=2", 1),
        ("(5,7),(2,2)", "p=5,q=2;p=7,q=2", 0),
        ("5,2,7,2", "p=5,q=2;p=7,q=2", 0),
        # exponents with braces in them
        (r"10^{\frac{\sqrt{13}-5}{6}}", r"10^{\frac{-5+\sqrt{13}}{6}}", 1),
        (r"10^{-\frac{5+\sqrt{13}}{6}}", r"10^{\frac{-5+\sqrt{13}}{6}}", 0),
        ("e^{x/2}", r"e^{\frac{x}{2}}", 1),
        (r"e^{\frac{x}{3}}", r"e^{\frac{x}{2}}", 0),
        (r"2^{200\cdot200\cdot200\cdot200}", "4", 0),
        (r"2^{\frac{9^{9^{9}}}{2}}", "4", 0),
        (r"\varnothing", r"\emptyset", 1),
        # inequalities
        ("(-793,10)", "-793<a<10", 1),
        (r"x\in(0,1]", r"0<x\le1", 1),
        ("y in (0,1]", r"0<x\le1", 0),
        ("(0,1]", "0<f(x)<1", 0),
        (r"(5,\infty)", "x>5", 1),
        (r"(-\infty,5]", r"5\geqslant x", 1),
        (r"(-\infty,5)", "x>5", 0),
        ("-793<a<10", "(-793,10)", 0),
        ("1<x<2", "2>x>1", 1),
        # members
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", 1),
        (r"\begin{bmatrix}1 & 2\\ \frac{6}{2} & 4\end{bmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", 1),
        (r"\begin{pmatrix}1&2\\4&3\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", 0),
        (r"\begin{pmatrix}1&2&3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", 0),
        (r"\{3, 1, 2\}", "1, 2, 3", 1),
        ("1 and 2", r"2\text{ and }1", 1),
        (r"[0, 1)", "[0,1]", 0),
        (r"(-\infty, 2] \cup [3, 4)", r"[3,4) \cup (-\infty,2]", 1),
        (r"\sum_{k=0}^{n} k", r"\sum_{k=0}^{n} k", 1),
        ("12:00", "12:00", 1),
        ("1:00", "12:00", 0),
    ],
)
def test_math_of_what_data_sets_hold(text, answer, value):
    assert math_(text, answer, MathArgs()) == value


@pytest.mark.parametrize("answer", [None, True, " ", float("nan"), {"a": 1}, r"\frac{1}{"])
def test_math_refuses_answers_that_cannot_be_compared(answer):
    with pytest.raises(ValueError, match="no mathematical expression"):
        math_("5", answer, MathArgs())


# --- choice


@pytest.mark.parametrize(
    ("text", "answer", "options", "value"),
    [
        ("A. G", "A", ["G", "C", "D", "A"], 1),
        ("D. A", "A", ["G", "C", "D", "A"], 0),
        ("A. A", "A", ["G", "C", "D", "A"], 0),
        ("A", "A", ["G", "C", "D", "A"], 1),
        ("A. G", "G", ["G", "C", "D", "A"], 1),
        ("A. C++", "A", ["C++", "C"], 1),
        ("C++", "A", ["C++", "C"], 1),
        ("C++", "B", ["C++", "C"], 0),
        ("B. C++", "B", ["C++", "C"], 0),
        ("The answer is C++", "B", ["C", "C++", "C#"], 1),
        ("-5", "A", ["-5", "5"], 1),
        ("5", "A", ["-5", "5"], 0),
        ("B. 5", "B", ["-5", "5"], 1),
        ("1.0", "A", ["1.0", "10"], 1),
        ("10", "A", ["1.0", "10"], 0),
        ("x^2", "A", ["x^2", "x_2"], 1),
        ("A) x_2", "A", ["x^2", "x_2"], 0),
        ("a-b", "B", ["a+b", "a-b"], 1),
        ("us", "B", ["US", "us"], 1),
        ("C", "A", ["C++", "Java"], 0),
        ("2", 2, [1, 2, 3], 1),
        ("B", 2, [1, 2, 3], 1),
    ],
)
def test_choice_between_options_that_are_letters_or_differ_in_signs(text, answer, options, value):
    assert choice(text, answer, ChoiceArgs(options="o"), meta={"o": options}) == value


# --- golds in answer tags or boxes, for every part that compares with one

GOLDS = {
    "exact": ("3", "3"), "normalised": ("The cat", "cat"), "number": ("3.5", "3.50"), "relaxed": ("100", "101"),
    "count": ("3", "three"), "choice": ("B", "B"), "math": (r"\frac{1}{2}", "0.5"), "anls": ("ab", "ab"),
    "cer": ("ab", "ab"), "wer": ("a b", "a b"), "set_f1": ("red, blue", "blue, red"),
    "box_iou": ("[1, 2, 3, 4]", "[1, 2, 3, 4]"), "point_in_box": ("[1, 2, 3, 4]", "[2, 3]"),
    "grounding_f1": ("[[1, 2, 3, 4]]", "[[1, 2, 3, 4]]"),
}  # fmt: skip


@pytest.mark.parametrize("kind", GOLDS)
@pytest.mark.parametrize(
    "marks", ["{}", "<answer> {} </answer>", "So it is so.\n<answer>{}</answer>", "It is \\boxed{{{}}}."]
)
@pytest.mark.parametrize("extract", ["<answer>(.*?)</answer>", "Answer: (.*)"])
def test_an_answer_in_the_form_of_a_response_is_what_it_states(kind, marks, extract):
    gold, said = GOLDS[kind]
    response = f"Answer: {said}" if extract[0] == "A" else f"<answer>{said}</answer>"
    scored = one_part(kind, extract=extract).score(prompt(marks.format(gold)), completion(response))
    assert (scored.value, scored.error) == (1.0, None)


def test_an_answer_that_states_two_is_a_fault_of_the_data():
    with pytest.raises(GspoError, match="states 2 different answers"):
        one_part("number").check_answer(prompt("<answer>3</answer> or <answer>4</answer>"))


def test_a_pattern_without_marks_leaves_the_answer_as_it_is():
    scored = one_part("number", extract=r"(-?[0-9.]+)").score(prompt("12.5"), completion("12.5"))
    assert scored.value == 1.0


@pytest.mark.parametrize(
    "gold", [r"\begin{cases} x & y \\ 1 & 2 \end{cases}", "f(g(h(x)))!", "?", "- 5 -", "١٢", "don't"]
)
@pytest.mark.parametrize("kind", ["exact", "normalised", "relaxed", "math", "anls", "cer", "wer"])
def test_a_response_that_is_the_answer_word_for_word_is_right(kind, gold):
    assert one_part(kind).score(prompt(gold), completion(f"<answer> {gold}\n</answer>")).value == 1.0


def test_a_member_of_a_box_or_a_set_is_not_the_answer():
    assert one_part("box_iou").score(prompt([10, 20, 30, 40]), completion("<answer>10</answer>")).value == 0.0
    assert one_part("set_f1").score(
        prompt(["a", "b"]), completion("<answer>a</answer>")
    ).value == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "answer",
    [
        "#### 7",
        "She had 48/2 = <<48/2=24>>24 left.\n#### 24",
        "The answer is 72.",
        "She sold 72 in total, since half of 48 is 24.",
        "one two three four five six seven eight nine ten eleven twelve",
        "<answer></answer>",
        r"\boxed{}",
        "1+" * 100 + "1",
        "",
        " ",
        None,
        True,
        [],
        float("nan"),
    ],
)
def test_what_is_no_final_answer_cannot_be_judged_as_mathematics(answer):
    with pytest.raises(GspoError, match="part p of"):
        one_part("math", extract="boxed").check_answer(prompt(answer))


# --- before training

PARTS = [
    {"name": "count", "type": "count", "tasks": ["count"], "accuracy": True},
    {"name": "box", "type": "box_iou", "tasks": ["box"], "accuracy": True},
    {"name": "words", "type": "normalised", "tasks": ["words"], "accuracy": True},
    {"name": "form", "type": "format", "args": {"pattern": ".*"}},
]


def make_config(folder: Path, samples: list[tuple[object, str]], parts=PARTS, **data):
    (folder / "reward.yaml").write_text(yaml.safe_dump({"name": "n", "parts": parts}))
    members = [
        member
        for i, (answer, task) in enumerate(samples)
        for member in (
            (f"{i:06d}.png", image_bytes()),
            (f"{i:06d}.json", record(answer=answer, task=task)),
        )
    ]
    write_tar(folder / "train-000000.tar", members)
    values = {
        "run": {"name": "r", "dir": str(folder / "runs")},
        "model": {"path": "m"},
        "data": {"train": [str(folder / "train-*.tar")], "shuffle_buffer": 0, **data},
        "reward": {"file": str(folder / "reward.yaml")},
    }
    return parse_config(values)


def check(config, **options) -> str:
    with closing(load_rewards(config.reward, {})) as rewards:
        return check_answers(config, rewards, **options)


def test_answers_that_no_part_can_judge_are_named_before_training(tmp_path: Path) -> None:
    samples = [
        (3, "count"),
        ("several", "count"),
        ("top left", "box"),
        ([1, 2, 3, 4], "box"),
        (None, "words"),
        ("a", "words"),
    ]
    with pytest.raises(DataError) as error:
        check(make_config(tmp_path, samples))
    told = str(error.value)
    assert "data.train: 3 of the first 6 samples cannot be used (3 unusable answer)" in told
    assert "train-000000.tar/000001: unusable answer: task count: part count of" in told
    assert "answer 'several' is no count: a whole number from 0 on" in told
    assert "train-000000.tar/000002" in told
    assert "answer 'top left' is no box" in told
    assert "train-000000.tar/000004" in told
    assert "000003" not in told
    assert "data.max_bad_fraction=0.01" in told


def test_what_to_do_about_a_damaged_shard_is_said(tmp_path: Path) -> None:
    config = make_config(tmp_path, [(1, "count")] * 20)
    shard = tmp_path / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2 + 100])
    with pytest.raises(DataError, match=r"\(1 damaged shard\)") as error:
        check(config, everything=True)
    assert str(error.value).endswith("Make or copy damaged shards again.")


def test_with_all_every_sample_is_looked_at_and_the_list_is_bounded(tmp_path: Path) -> None:
    config = make_config(tmp_path, [(1, "count")] * 110 + [("several", "count")] * 30)
    assert check(config) == "data.train: the answers of the first 100 samples can be judged"
    with pytest.raises(
        DataError, match=r"30 of all 140 samples cannot be used \(30 unusable answer\)"
    ) as error:
        check(config, everything=True)
    assert str(error.value).count("several") == 10
    assert "and 20 more" in str(error.value)


def test_a_task_that_leaves_the_accuracy_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = make_config(tmp_path, [(1, "count"), (1, "coutn"), (2, "coutn")])
    with caplog.at_level(logging.WARNING):
        assert "tasks that count in no accuracy: coutn" in check(config)
    assert (
        caplog.text.count(
            "task 'coutn' (first in sample train-000000.tar/000001) has no part with `accuracy`"
        )
        == 1
    )


def test_without_any_accuracy_no_task_is_named(tmp_path: Path) -> None:
    assert "accuracy" not in check(make_config(tmp_path, [(1, "a"), (1, "b")], parts=PARTS[3:]))


def test_a_task_that_no_part_covers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RewardFileError, match="task='coutn', which no part covers"):
        check(make_config(tmp_path, [(1, "count"), (1, "coutn")], parts=PARTS[:3]))


def test_a_choice_without_its_options_is_a_fault_of_the_data(tmp_path: Path) -> None:
    parts = [{"name": "c", "type": "choice", "args": {"options": "options"}}]
    with pytest.raises(DataError, match=r"meta\.options=None lists no options"):
        check(make_config(tmp_path, [("A", "q")], parts=parts))


def test_a_part_of_the_users_own_may_say_what_it_can_judge(tmp_path: Path) -> None:
    parts = [{"name": "own", "python": "tests.unit.failing_rewards:even", "args": {"least": 2}}]
    with pytest.raises(DataError, match=r"part own of .*: 1 is no even number from 2 on"):
        check(make_config(tmp_path, [(2, "q"), (1, "q")], parts=parts))


# --- rewards that fail


def evaluated(*scores: Score | None, tasks: str = "t") -> dict[str, float]:
    """Metrics of held-out answers with these scores; None is a failed one."""
    failed = Score(value=float("nan"), parts={}, error="part judge: no connection")
    encoded = [
        SimpleNamespace(prompt=prompt("a", task=tasks[i % len(tasks)]), token_ids=(1,))
        for i in range(len(scores))
    ]

    def score_groups(groups):
        return [
            RolloutGroup(**{**vars(g), "scores": (score or failed,)})
            for g, score in zip(groups, scores, strict=True)
        ]

    engine = SimpleNamespace(
        version=0, generate=lambda prompts, *_, **__: [[completion("a")] for _ in prompts]
    )
    metrics, _ = evaluate(engine, encoded, SimpleNamespace(score_groups=score_groups), max_new_tokens=4)
    return metrics


def test_failed_rewards_are_in_no_held_out_mean() -> None:
    right, wrong = (Score(value=v, parts={}, accuracy=v) for v in (1.0, 0.0))
    metrics = evaluated(*[right] * 2, *[wrong] * 10, None, None)
    assert metrics["eval/accuracy"] == metrics["eval/reward"] == pytest.approx(2 / 12)
    assert metrics["eval/failed"] == pytest.approx(2 / 14)
    assert metrics["eval/judged"] == 12
    assert describe_accuracy(metrics) == "held-out accuracy 16.7 %"


def test_an_accuracy_that_nothing_measures_is_no_zero() -> None:
    metrics = evaluated(None, None, None)
    assert metrics == {"eval/failed": 1.0}
    assert (
        describe_accuracy(metrics)
        == "held-out accuracy cannot be measured: the reward of every answer failed"
    )
    metrics = evaluated(Score(value=0.5, parts={}))
    assert metrics == {"eval/reward": 0.5, "eval/failed": 0.0}
    assert "no part measures these tasks" in describe_accuracy(metrics)


def test_a_task_without_accuracy_does_not_lower_that_of_others() -> None:
    metrics = evaluated(Score(value=1.0, parts={}, accuracy=1.0), Score(value=0.0, parts={}), tasks="ab")
    assert metrics["eval/accuracy"] == metrics["eval/accuracy/a"] == 1.0
    assert "eval/accuracy/b" not in metrics


def failed_groups(count: int, reason: str) -> list[RolloutGroup]:
    score = Score(value=float("nan"), parts={}, error=reason)
    return [
        RolloutGroup(id=i, prompt=prompt("a"), prompt_ids=(), completions=(completion("a"),), scores=(score,))
        for i in range(count)
    ]


def test_the_same_reason_is_logged_in_full_once(caplog: pytest.LogCaptureFixture) -> None:
    limits, told = RewardConfig(file="f", max_failed_fraction=1.0), set[str]()
    with caplog.at_level(logging.WARNING):
        for step in range(20):
            check_failures(
                failed_groups(3, "cannot be asked: ConnectError"), limits, what=f"step {step}", logged=told
            )
        check_failures(failed_groups(3, "answered 500"), limits, what="step 20", logged=told)
    assert caplog.text.count("ConnectError") == 1
    assert caplog.text.count("answered 500") == 1
    assert "100% of the rewards of step 19 failed" in caplog.text


def test_saved_answers_that_fail_alike_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    groups = failed_groups(20, "cannot be asked: ConnectError")
    answers = [Answer(prompt=g.prompt, completion=g.completions[0]) for g in groups]
    show_scores(answers, [g.scores[0] for g in groups], 20, table_console())
    shown = capsys.readouterr().out
    assert shown.count("ConnectError") == 1
    assert "and 15 more failed" in shown
