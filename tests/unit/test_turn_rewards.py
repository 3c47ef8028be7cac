"""Rewards of answers in turns."""

from dataclasses import replace
from typing import Any

import pytest

from gspo_mm.reward.spec import RewardFileError, parse_reward
from gspo_mm.types import (
    Completion,
    Finish,
    Observation,
    Turn,
)
from tests.unit.test_environment import asked

# --- rewards


def in_turns(*texts: str, seen: str = "") -> Completion:
    """Turns of these texts, each but the last answered with `seen`."""
    turns = [Turn(token_ids=(1,), logprobs=(0.0,), versions=(0,), text=text) for text in texts]
    answered = [replace(turn, observation=Observation(token_ids=(2,), text=seen)) for turn in turns[:-1]]
    return Completion(turns=(*answered, turns[-1]), finish=Finish.STOP)


@pytest.mark.parametrize(("read", "values"), [("last", [1.0, 0.0]), ("all", [0.0, 0.0])])
def test_a_part_reads_the_last_turn_or_all(read: str, values: list[float]) -> None:
    part = {"name": "a", "type": "exact", "read": read}
    function = parse_reward({"name": "r", "parts": [part]}, file="r.yaml")
    answers = [in_turns("let me see", "7"), in_turns("7", "let me see")]
    assert [function.score(asked(), answer).value for answer in answers] == values
    (whole,) = [function.score(asked(answer="7\n8"), in_turns("7", "8")).value]
    assert whole == float(read == "all")


CALL = '<tool_call>{"name": "rotate", "arguments": {"degrees": 90}}</tool_call>'


@pytest.mark.parametrize(
    ("args", "answer", "value"),
    [
        ({"least": 1}, in_turns(CALL, "7"), 1.0),
        ({"least": 1}, in_turns("7"), 0.0),
        ({"most": 1}, in_turns(CALL, CALL, "7"), 0.0),
        ({"most": 0}, in_turns("7"), 1.0),
        ({}, in_turns(CALL, "7", seen="Error: there is no tool"), 0.0),
        ({"valid": False}, in_turns(CALL, "7", seen="Error: there is no tool"), 1.0),
        ({}, in_turns("<tool_call>{</tool_call>", "7"), 0.0),
        ({"valid": False, "least": 1}, in_turns("<tool_call>{</tool_call>", "7"), 0.0),
    ],
)
def test_calls_of_tools_are_counted_over_all_turns(
    args: dict[str, Any], answer: Completion, value: float
) -> None:
    function = parse_reward(
        {"name": "r", "parts": [{"name": "a", "type": "tool_calls", "args": args}]}, file="r.yaml"
    )
    assert function.score(asked(), answer).value == value


def test_bounds_of_calls_that_cross_are_refused() -> None:
    part = {"name": "a", "type": "tool_calls", "args": {"least": 2, "most": 1}}
    with pytest.raises(RewardFileError, match="most=1 is below least=2"):
        parse_reward({"name": "r", "parts": [part]}, file="r.yaml")
