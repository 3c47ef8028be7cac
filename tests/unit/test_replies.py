"""Replies become the same arrays here and in the process that reads large ones, which ends with the trainer."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import psutil
import pytest

from gspo_mm.rollout.replies import ReplyError, ReplyReader, answers, check, compact
from gspo_mm.types import Finish

PATIENCE = 60  # seconds


def body(tokens: int, *, samples: int = 2) -> bytes:
    sample: dict[str, Any] = {
        "text": "a" * tokens,
        "output_ids": list(range(tokens)),
        "prompt_token_ids": [5, 6],
        "meta_info": {
            "output_token_logprobs": [[-0.1 * t, t, None] for t in range(tokens)],
            "prompt_tokens": 2,
            "finish_reason": {"type": "length", "length": tokens},
            "weight_versions": [{"version": "3", "start": 0, "end": tokens}],
        },
    }
    return json.dumps([sample] * samples).encode()


ASKED: dict[str, Any] = {"sampling_params": {"n": 2, "max_new_tokens": 5000, "stop_token_ids": [9999]}}


def words(token_ids: Iterable[int]) -> str:
    return " ".join(map(str, token_ids))


def read(reader: ReplyReader, content: bytes) -> list[dict[str, Any]]:
    return asyncio.run(
        reader.read(content, ASKED | {"image_data": [[...]]})
    )  # which no process could be sent


def read_here(content: bytes) -> list[dict[str, Any]]:
    return answers(content, ASKED, words, None)


@pytest.fixture
def reader() -> Iterator[ReplyReader]:
    reader = ReplyReader(words)
    yield reader
    reader.close()


def children() -> set[int]:
    """Without Python's own that unlinks semaphores, which comes and goes."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            tracks = any("resource_tracker" in word for word in process.cmdline())
            if process.status() != psutil.STATUS_ZOMBIE and not tracks:
                found.add(process.pid)
    return found


def kill(pids: set[int]) -> None:
    """Returns when they are gone, so that the next look at the children finds none of them."""
    assert pids
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE
    while pids & children():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_numbers_stay_what_they_were() -> None:
    (sample, _) = compact(body(3))
    assert tuple(sample["output_ids"]) == (0, 1, 2)
    assert tuple(sample["prompt_token_ids"]) == (5, 6)
    assert tuple(sample["meta_info"]["output_token_logprobs"]) == (-0.0, -0.1, -0.2)
    assert sample["meta_info"]["prompt_tokens"] == 2


def test_small_replies_are_read_here(reader: ReplyReader) -> None:
    before = children()
    assert read(reader, body(10)) == read_here(body(10))
    assert children() == before


def test_large_replies_are_read_and_checked_elsewhere(
    reader: ReplyReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = body(5000)
    before, here = children(), read_here(large)
    monkeypatch.setattr("gspo_mm.rollout.replies.compact", None)
    monkeypatch.setattr("gspo_mm.rollout.replies.check", None)
    assert read(reader, large) == here
    assert children() > before


def test_a_reading_process_that_dies_is_started_again_and_after_three_times_no_more(
    reader: ReplyReader,
) -> None:
    before = children()
    large = body(5000)
    for _ in range(3):
        read(reader, large)
        kill(children() - before)
    assert read(reader, large) == read_here(large)
    assert children() <= before


_TRAINER = """
import asyncio, os, sys, time
from gspo_mm.rollout.replies import ReplyReader
if __name__ == "__main__":
    asked = {"sampling_params": {"n": 2, "max_new_tokens": 5000, "stop_token_ids": [9999]}}
    asyncio.run(ReplyReader(str).read(sys.stdin.buffer.read(), asked))
    print("read", flush=True)
    time.sleep(600)
"""


def test_the_reading_process_does_not_survive_the_trainer(tmp_path: Any) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(_TRAINER)
    with subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as trainer:
        assert trainer.stdin
        assert trainer.stdout
        trainer.stdin.write(body(5000))
        trainer.stdin.close()
        assert trainer.stdout.readline() == b"read\n"
        readers = psutil.Process(trainer.pid).children(recursive=True)
        assert readers
        trainer.kill()
        _, alive = psutil.wait_procs(readers, timeout=PATIENCE)
        assert not alive


# --- what cannot be used

STOP = 99
REQUEST: dict[str, Any] = {
    "sampling_params": {"n": 2, "max_new_tokens": 4, "stop_token_ids": [STOP, 98]},
    "input_ids": [[5, 6]],
}


def said(**changes: Any) -> dict[str, Any]:
    """A good answer, but for `changes`; those of meta_info by the name of what is in it. `...`: it is left out."""
    meta = {
        "finish_reason": {"type": "length", "length": 3},
        "prompt_tokens": 2,
        "weight_versions": [{"version": "3", "start": 0, "end": 9}],
        "output_token_logprobs": [[-0.5, 1, None], [-1, 2, "b"], [0.0, 3, None]],
    }
    answer: dict[str, Any] = {"output_ids": [1, 2, 3], "prompt_token_ids": [5, 6], "text": "abc"}
    for name, value in changes.items():
        (meta if name in meta else answer)[name] = value
    answer.setdefault("meta_info", meta)
    return {
        k: {n: v for n, v in value.items() if v is not ...} if isinstance(value, dict) else value
        for k, value in answer.items()
        if value is not ...
    }


def judged(*answers: Any, request: dict[str, Any] = REQUEST) -> list[Finish]:
    return check(compact(json.dumps(list(answers)).encode()), request, vocab_size=100)


def stopped(ids: list[int], matched: Any = ...) -> dict[str, Any]:
    """An answer of these ids that is said to have been stopped by `matched`: the last of them unless told otherwise."""
    return said(
        output_ids=ids,
        output_token_logprobs=[[-1.0, token, None] for token in ids],
        finish_reason={"type": "stop", "matched": ids[-1] if matched is ... else matched},
    )


def test_an_answer_ends_with_one_of_our_stop_tokens_or_is_cut_off() -> None:
    assert judged(stopped([1, STOP]), said()) == [Finish.STOP, Finish.LENGTH]
    # a server that counts tokens before it looks for stops
    last = said(
        output_ids=[1, 2, 3, 98],
        output_token_logprobs=[[-1.0, token, None] for token in (1, 2, 3, 98)],
    )
    assert judged(last, stopped([98])) == [Finish.STOP, Finish.STOP]


BAD = {
    "a log-prob is null": (said(output_token_logprobs=[[-0.5, 1], [None, 2], [0, 3]]), "token 1 is null"),
    "a log-prob is text": (said(output_token_logprobs=[[-0.5, 1], ["-1", 2], [0, 3]]), "token 1 is -1"),
    "a log-prob is true": (said(output_token_logprobs=[[True, 1], [-1, 2], [0, 3]]), "token 0 is True"),
    "a probability above 1": (said(output_token_logprobs=[[-1, 1], [-1, 2], [0.5, 3]]), "token 2 is 0.5"),
    "a log-prob too few": (said(output_token_logprobs=[[-1, 1], [-1, 2]]), "2 log-probs .* of its 3 tokens"),
    "log-probs of other tokens": (said(output_token_logprobs=[[-1, 1], [-1, 3], [-1, 2]]), "not those of"),
    "log-probs alone": (said(output_token_logprobs=[-1.0, -1.0, -1.0]), "no pair"),
    "log-probs as an object": (said(output_token_logprobs={"0": -1}), "output_token_logprobs is no list"),
    "no log-probs": (said(output_token_logprobs=...), "output_token_logprobs is missing"),
    "log-probs are null": (said(output_token_logprobs=None), "output_token_logprobs is no list"),
    "no tokens": (said(output_ids=...), "output_ids is missing"),
    "tokens as text": (said(output_ids="abc"), "output_ids is no list"),
    "a token is text": (said(output_ids=[1, "2", 3]), "something else than token ids|not those of"),
    "a token is a float": (
        said(output_ids=[1, 2.5, 3], output_token_logprobs=[[-1, 1], [-1, 2.5], [-1, 3]]),
        "something else than token ids",
    ),
    "a token too large for any array": (
        said(output_ids=[2**63], output_token_logprobs=[[-1, 2**63]]),
        "something else than token ids",
    ),
    "a prompt token is null": (said(prompt_token_ids=[5, None]), "prompt_token_ids has something else"),
    "a token outside of the vocabulary": (
        said(output_ids=[1, 100], output_token_logprobs=[[-1, 1], [-1, 100]]),
        "token ids 1 to 100 are not in the vocabulary of 100",
    ),
    "a negative token": (
        said(output_ids=[-1, 1], output_token_logprobs=[[-1, -1], [-1, 1]]),
        "token ids -1 to 1 are not",
    ),
    "an empty answer": (said(output_ids=[], output_token_logprobs=[]), "it has 0 tokens"),
    "an empty answer that stopped": (
        said(output_ids=[], output_token_logprobs=[], finish_reason={"type": "stop", "matched": STOP}),
        "stopped by 99 at token None",
    ),
    "more tokens than asked for": (
        said(output_ids=[1] * 5, output_token_logprobs=[[-1, 1]] * 5),
        "it has 5 tokens, and max_new_tokens=4",
    ),
    "NaN happened": (stopped([1, STOP], "NaN happened"), "logits are not finite"),
    "a stop string": (stopped([1, 2], "</answer>"), r"stopped by '</answer>' at token 2, .* are \[98, 99\]"),
    "a stop string at a stop token": (stopped([1, STOP], "</answer>"), "stopped by '</answer>'"),
    "a stop token that is not ours": (stopped([1, 2]), r"stopped by 2 at token 2, .* \[98, 99\]"),
    "another token than the last": (stopped([1, 98], STOP), "stopped by 99 at token 98"),
    "a stop token that is not there": (stopped([1, 2], STOP), "stopped by 99 at token 2"),
    "a stop without its token": (stopped([1, STOP], None), "stopped by None"),
    "a list of stop tokens": (stopped([1, STOP], [STOP]), "stopped by"),
    "tokens after a stop token": (stopped([1, 98, STOP]), "goes on after the stop token 98"),
    "an answer given up": (
        said(finish_reason={"type": "abort", "message": "out of memory"}),
        "the server gave it up.*out of memory",
    ),
    "an answer given up with nothing in it": (
        {"meta_info": {"finish_reason": {"type": "abort", "message": "no room"}}},
        "gave it up.*no room",
    ),
    "an unknown end": (said(finish_reason={"type": "tool_calls"}), "tool_calls.* none that is known"),
    "an end without a type": (said(finish_reason={}), "none that is known"),
    "an end as text": (said(finish_reason="stop"), "'stop' is none that is known"),
    "no end": (said(finish_reason=None), "None is none that is known"),
    "no length of the prompt": (said(prompt_tokens=...), "prompt_tokens=None is no number"),
    "a length of the prompt as text": (said(prompt_tokens="2"), "prompt_tokens='2' is no number"),
    "no weight version": (said(weight_versions=...), "weight version None is none"),
    "weights that nobody brought": (
        said(weight_versions=[{"version": "default", "start": 0, "end": 3}]),
        "weight version .*'default'.* is none",
    ),
    "a version for some tokens only": (
        said(weight_versions=[{"version": "3", "start": 0, "end": 2}]),
        "or not of all tokens",
    ),
    "versions that are no spans": (said(weight_versions=["3"]), "weight version"),
    "versions without places": (said(weight_versions=[{"version": "3"}]), "weight version"),
    "versions at no place": (
        said(weight_versions=[{"version": "3", "start": None, "end": 2}]),
        "weight version",
    ),
    "no meta_info": (said(meta_info=...), "it has no meta_info"),
    "meta_info is null": (said(meta_info=None), "it has no meta_info"),
    "no answer": (None, "it has no meta_info: None"),
    "text": ("abc", "it has no meta_info: abc"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_answer_that_training_cannot_rely_on_is_refused(name: str) -> None:
    answer, words = BAD[name]
    with pytest.raises(ReplyError, match=f"answer 1: .*({words})"):
        judged(said(), answer)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<html>502 Bad Gateway</html>", "it is no JSON: .*Bad Gateway"),
        (b"", "it is no JSON"),
        (b'[{"output_ids": [1', "it is no JSON"),
        (b'[{"meta_info": NaN}]', "it is no JSON"),
        (b"null", "it is no list of answers"),
        (b'{"error": {"message": "no model"}}', "it is no list of answers: .*no model"),
    ],
)
def test_a_reply_that_is_no_list_of_answers_is_refused(content: bytes, words: str) -> None:
    with pytest.raises(ReplyError, match=words):
        compact(content)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_as_many_answers_as_were_asked_for_are_expected(count: int) -> None:
    with pytest.raises(ReplyError, match=f"{count} answers where 2 were asked for"):
        judged(*[said()] * count)


def test_each_answer_is_held_against_its_own_parameters() -> None:
    short, long = REQUEST["sampling_params"] | {"n": 1, "max_new_tokens": 2}, REQUEST["sampling_params"]
    assert judged(said(), said(), request={"sampling_params": [long, long]}) == [Finish.LENGTH] * 2
    with pytest.raises(ReplyError, match="answer 1: it has 3 tokens, and max_new_tokens=2"):
        judged(said(), said(), request={"sampling_params": [long, short]})


@pytest.mark.parametrize(
    ("of_prompt", "words"),
    [
        ([[None, 5, None], [None, 6, None]], "the log-prob of token 0 is null"),
        ([[None, 5, None]], "it has 1 log-probs of its prompt's tokens"),
        (None, "input_token_logprobs is no list"),
        ([[None, 5], -1.0], "no pair"),
    ],
)
def test_log_probs_of_the_prompt_are_held_to_the_same_where_they_are_asked_for(
    of_prompt: Any, words: str
) -> None:
    answers = [said(), said()]
    for answer in answers:
        answer["meta_info"]["input_token_logprobs"] = [[None, 5, None], [-2.5, 6, None]]
    asked = REQUEST | {"logprob_start_len": 0}
    assert len(judged(*answers, request=asked)) == 2
    answers[1]["meta_info"]["input_token_logprobs"] = of_prompt
    assert len(judged(*answers)) == 2
    with pytest.raises(ReplyError, match=f"answer 1: .*{words}"):
        judged(*answers, request=asked)


def test_what_is_wrong_is_told_by_the_process_that_reads_large_replies_as_well(reader: ReplyReader) -> None:
    answer = json.loads(body(5000))[0]
    answer["meta_info"]["output_token_logprobs"][4321][0] = None
    with pytest.raises(ReplyError, match="answer 0: the log-prob of token 4321 is null"):
        read(reader, json.dumps([answer]).encode())
