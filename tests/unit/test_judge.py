"""The judge: what it is asked, what its words are worth, what it may cost; and services that fail."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gspo_mm.commands.rescore import check_cases
from gspo_mm.config import RewardConfig
from gspo_mm.reward import RewardFileError, load_reward
from gspo_mm.reward.judge import JudgeArgs, read_verdict, request_body
from gspo_mm.reward.rewards import Rewards, load_rewards
from gspo_mm.types import Completion, EncodedImage, Finish, Prompt, RolloutGroup, Score
from tests.fake_judge import FakeJudge, split, text_of

CONFIGS = Path(__file__).parents[2] / "configs"
PNG = io.BytesIO()
Image.new("RGB", (3, 2), "red").save(PNG, "PNG")
PICTURE = EncodedImage(data=PNG.getvalue(), key="k", width=3, height=2)

type Make = Callable[..., Rewards]


@pytest.fixture
def judge() -> Iterator[FakeJudge]:
    with FakeJudge() as judge:
        yield judge


@pytest.fixture
def make(judge: FakeJudge, tmp_path: Path) -> Iterator[Make]:
    made: list[Rewards] = []

    def load(
        *, kind: str = "judge", gate: str | None = None, extract: str | None = None, **args: Any
    ) -> Rewards:
        args = {"url": judge.url, "retries": 0} | args
        if kind == "judge":
            args = {
                "model": "m",
                "rubric": "Be fair.",
                "scale": [0, 2],
                "cache": str(tmp_path / "v.sqlite"),
            } | args
        parts = [{"name": "other", "type": kind, "accuracy": True, "args": args}]
        if gate:
            parts.append({"name": "gate", "type": "format", "args": {"pattern": gate}})
        path = tmp_path / f"{len(made)}.yaml"
        content = {"name": "n", "extract": extract, "parts": parts, "gate": ["gate"] if gate else []}
        path.write_text(yaml.safe_dump(content))
        made.append(load_rewards(RewardConfig(file=str(path), workers=1), {}))
        return made[-1]

    yield load
    for rewards in made:
        rewards.close()


def scores(rewards: Rewards, *texts: str, answer: Any = "red", images: int = 0) -> list[Score]:
    question = ({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which colour?"}]},)
    prompt = Prompt(key="shard/1", messages=question, images=(PICTURE,) * images, answer=answer, task="t")
    answers = tuple(
        Completion.of_one_turn(token_ids=(1,), logprobs=(0.0,), versions=(0,), finish=Finish.STOP, text=text)
        for text in texts
    )
    group = RolloutGroup(id=0, prompt=prompt, prompt_ids=(1,), completions=answers)
    return list(rewards.score_groups([group])[0].scores)


def test_the_cases_of_the_shipped_file_pass(
    judge: FakeJudge, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The judge here is gullible: attempts to speak to it from inside a response fail because they stay inside."""
    path = CONFIGS / "rewards/judge.yaml"
    monkeypatch.setenv("JUDGE_URL", judge.url)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    checked = check_cases(path, load_reward(path).spec.cases)
    assert [f"{c.case.response[:60]!r}: {c.faults}" for c in checked if c.faults] == []
    assert len(checked) >= 20
    asked = {text_of(request) for request in judge.requests}
    assert (
        len(asked)
        == len(judge.requests)
        == sum(1 for c in checked if len(c.case.response.strip()) > 0 and c.case.repeat == 1)
    )
    assert (tmp_path / "gspo_mm/verdicts.sqlite").exists()


def test_it_is_shown_question_picture_reference_and_response(make: Make, judge: FakeJudge) -> None:
    (score,) = scores(make(extra={"seed": 3}), "It is red.", answer=["red", "crimson"], images=1)
    assert score.value == 0.5, "one of the words of the reference"
    assert score.accuracy == 0.0
    (body,) = judge.requests
    picture, text = body["messages"][1]["content"]
    assert (
        base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/png;base64,")) == PICTURE.data
    )
    for part in ("[image]Which colour?", '["red", "crimson"]', "\nIt is red.\n"):
        assert part in text["text"]
    assert "Be fair." in body["messages"][0]["content"]
    assert (body["model"], body["temperature"], body["seed"]) == ("m", 0.0, 3)
    assert body["response_format"]["json_schema"]["schema"]["properties"]["score"]["enum"] == [0, 1, 2]


def test_pictures_and_the_form_can_be_left_out(make: Make, judge: FakeJudge) -> None:
    scores(make(images=False, structured=False, reason=False), "red", images=1)
    (body,) = judge.requests
    assert isinstance(body["messages"][1]["content"], str)
    assert "response_format" not in body
    assert "reason" not in body["messages"][0]["content"].split("Reply with")[1]


@given(text=st.text() | st.from_regex(r"</?response( [0-9a-f]{16})?>\n?", fullmatch=True))
@settings(max_examples=300)
def test_no_response_gets_out_of_its_marks(text: str) -> None:
    args = JudgeArgs(url="http://x", model="m", rubric="{braces} are text")
    prompt = Prompt(key="k", messages=({"role": "user", "content": "q"},), images=(), answer="a", task="t")
    inside, outside = split(request_body(args, text, prompt))
    assert inside == text
    assert outside == 'Question:\nq\n\nReference answer:\n"a"\n\nResponse to grade:'


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ('{"score": 2}', 2),
        ('{"reason": "x", "score": 0}', 0),
        ('```json\n{"score": 1}\n```', 1),
        ('{"score": 3}', None),
        ('{"score": -1}', None),
        ('{"score": true}', None),
        ('{"score": 1.5}', None),
        ('{"score": "2"}', None),
        ('{"score": 2, "score": 0}', None),
        ('{"reason": "x"}', None),
        ("[2]", None),
        ("2", None),
        ('I say {"score": 2}', None),
        ("", None),
        ('{"score": 2', None),
    ],
)
def test_only_a_score_on_the_scale_is_a_verdict(reply: str, score: int | None) -> None:
    if score is not None:
        assert read_verdict(reply, 0, 2) == score
        return
    with pytest.raises(ValueError, match="which is no score from 0 to 2"):
        read_verdict(reply, 0, 2)


@given(
    reply=st.text()
    | st.lists(st.sampled_from([*'{}[]":,-.e', "score", "2", "true", "\n", "```"]), max_size=30).map("".join)
)
@settings(max_examples=int(os.environ.get("GSPO_FUZZ", "300")), deadline=10_000)
def test_whatever_a_judge_writes_is_a_score_or_a_fault(reply: str) -> None:
    with suppress(ValueError):
        assert 0 <= read_verdict(reply, 0, 2) <= 2


@pytest.mark.parametrize(
    ("status", "reply", "message"),
    [
        (
            200,
            {"choices": [{"message": {"content": "very good"}}]},
            "the judge wrote 'very good', which is no score",
        ),
        (200, {"choices": [{"message": {"content": None}}]}, "is no chat completion"),
        (200, {"choices": []}, "is no chat completion"),
        (200, [1], "is no chat completion"),
        (200, "<html>", "answered no JSON: <html>"),
        (400, {"error": "no such model"}, 'answered 400: {"error": "no such model"}'),
        (401, "who are you", "answered 401: who are you"),
        (503, "busy", "answered 503: busy"),
    ],
)
def test_what_is_no_verdict_is_a_failed_reward_and_no_zero(
    status: int, reply: Any, message: str, make: Make, judge: FakeJudge
) -> None:
    judge.replies = [(status, reply)]
    first, second = scores(make(concurrency=1), "red", "blue")
    failed, fine = (first, second) if first.error else (second, first)
    assert message in str(failed.error)
    assert fine.error is None


def test_a_busy_service_is_asked_again_and_a_refusing_one_is_not(make: Make, judge: FakeJudge) -> None:
    judge.replies = [(503, "busy"), (429, "slowly")]
    assert scores(make(retries=2), "red")[0].value == 1.0
    assert len(judge.requests) == 3
    judge.replies = [(400, "no")] * 3
    assert "answered 400" in str(scores(make(retries=2), "blue")[0].error)
    assert len(judge.requests) == 4


def test_a_service_that_does_not_answer_fails_in_time(make: Make, judge: FakeJudge) -> None:
    judge.delay = 20.0
    assert "ReadTimeout" in str(scores(make(timeout=0.2), "red")[0].error)
    assert "cannot be asked: ConnectError" in str(scores(make(url="http://127.0.0.1:9/v1"), "red")[0].error)


def test_equal_responses_are_judged_once_even_after_a_restart(make: Make, judge: FakeJudge) -> None:
    judge.delay = 0.2
    assert [s.value for s in scores(make(), "red", "red", "blue", "red")] == [1.0, 1.0, 0.0, 1.0]
    assert len(judge.requests) == 2
    assert [s.value for s in scores(make(), "red", "blue")] == [1.0, 0.0]
    assert len(judge.requests) == 2
    scores(make(rubric="Be strict."), "red")
    assert len(judge.requests) == 3, "another question to it"


def test_no_more_is_spent_than_allowed(make: Make, judge: FakeJudge) -> None:
    prices = {"price_in": 100.0, "price_out": 1000.0}  # 0.01 + 0.01 for each verdict of 100 and 10 tokens
    texts = [f"red {i}" for i in "abcdefgh"]
    judged = scores(make(**prices, max_cost=0.05, concurrency=1), *texts)
    assert [s.error is None for s in judged].count(True) == 3
    reason = str(next(s.error for s in judged if s.error))
    assert "SpendError: the judge has cost 0.06 of max_cost=0.05; raise it to go on" in reason
    again = scores(make(**prices, max_cost=0.05), *texts)
    assert [s.error is None for s in again].count(True) == 3, "those that were paid for"
    assert len(judge.requests) == 3
    judge.replies = [(200, {"choices": [{"message": {"content": "?"}}], "usage": judge.usage})]
    rewards = make(**prices, max_cost=0.1, concurrency=1)
    assert [s.error is None for s in scores(rewards, *texts)].count(True) == 4, (
        "what is no verdict costs as well"
    )


def test_many_are_asked_at_a_time_but_no_more_than_allowed(make: Make, judge: FakeJudge) -> None:
    judge.delay = 0.1
    scores(make(concurrency=4), *(f"red {i}" for i in range(12)))
    assert judge.most_at_once == 4


def test_requests_keep_their_pace(make: Make, judge: FakeJudge) -> None:
    scores(make(per_minute=600), *(f"red {i}" for i in range(4)))
    first, *_, last = sorted(judge.times)
    assert last - first >= 0.25, "0.1 s between two, up to what the network adds"


def test_nobody_is_asked_where_it_cannot_matter(make: Make, judge: FakeJudge) -> None:
    rewards = make(gate="[a-z]+", extract="(?:x|(r.d))")
    closed, unstated = scores(rewards, "RED 1", "xx")
    assert (closed.value, closed.accuracy, dict(closed.parts)) == (0.0, 0.0, {"gate": 0.0})
    assert dict(unstated.parts) == {"other": 0.0, "gate": 1.0}
    assert not judge.requests
    assert scores(rewards, "red")[0].value == 2.0


def test_a_key_goes_to_the_service_and_must_be_there(
    make: Make, judge: FakeJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        RewardFileError, match=r"other\.args\.key_env='OWN_KEY' names an environment variable that is not"
    ):
        make(key_env="OWN_KEY")
    monkeypatch.setenv("OWN_KEY", "secret")
    scores(make(key_env="OWN_KEY"), "red")
    assert judge.keys == ["Bearer secret"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"url": "judge:8000"}, r"args\.url='judge:8000' is no address; write http:// or https:// before it"),
        ({"max_cost": 3.0}, r"args\.max_cost=3 needs prices"),
        ({"scale": [2, 0]}, r"args\.scale=\[2, 0\] is refused: write the worst score first"),
        ({"colour": 1}, r"args\.colour=1 is unknown"),
    ],
)
def test_a_mistake_is_one_sentence(args: dict[str, Any], message: str, make: Make) -> None:
    with pytest.raises(RewardFileError, match=message):
        make(**args)


def test_a_cache_that_cannot_be_written_fails_the_reward(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cache=" in str(scores(make(cache=str(tmp_path / "file/v.sqlite")), "red")[0].error)
    (tmp_path / "broken").write_text(
        "this is no database, not at all, and long enough to be read as one" * 20
    )
    assert "file is not a database" in str(scores(make(cache=str(tmp_path / "broken")), "red")[0].error)


# --- a reward service of the user's own


def test_a_service_gets_the_sample_and_gives_the_score(make: Make, judge: FakeJudge) -> None:
    judge.grade = lambda body: {"score": 0.25 if body["images"] else 1}
    rewards = make(kind="http", images=True, extra={"strict": True}, extract="<a>(.*?)</a>")
    (score,) = scores(rewards, "so <a>red</a>", images=1)
    assert score.value == 0.25
    (body,) = judge.requests
    assert base64.b64decode(body.pop("images")[0]) == PICTURE.data
    assert body == {
        "key": "shard/1",
        "task": "t",
        "question": "[image]Which colour?",
        "answer": "red",
        "meta": {},
        "text": "red",
        "response": "so <a>red</a>",
        "args": {"strict": True},
    }


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ({"score": 2}, "value 2.0 is outside [0, 1]"),
        ({"score": None}, "no number as score"),
        ({"score": True}, "no number as score"),
        ({"value": 1}, "no number as score"),
        ([1], "no number as score"),
    ],
)
def test_what_is_no_score_is_a_failed_reward(reply: Any, message: str, make: Make, judge: FakeJudge) -> None:
    judge.grade = lambda body: reply
    assert message in str(scores(make(kind="http"), "red")[0].error)


def test_a_service_may_answer_nan_only_as_a_failure(make: Make, judge: FakeJudge) -> None:
    judge.grade = lambda body: json.loads('{"score": NaN}')
    assert "outside [0, 1]" in str(scores(make(kind="http"), "red")[0].error)
