"""How much of its speed a loop on the training thread keeps while servers' replies are read: see `kept`."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gspo_mm.hf.decoding import Decoder
from gspo_mm.rollout.replies import ReplyReader
from gspo_mm.rollout.requests import completion_of
from gspo_mm.runtime.background import Background
from gspo_mm.types import EncodedPrompt, Prompt

ANSWERS, TOKENS = 16, 4096  # of a reply


def kept(model: Path, *, replies: int) -> tuple[float, float]:
    """Speed of a loop in Python's main thread while replies are read as fast as they can be, over its speed alone; and seconds.

    Replies are those of `ANSWERS` answers of `TOKENS` tokens, made into completions by another thread, as `SGLangEngine` does.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    body, asked = reply(tokenizer.get_vocab_size())
    prompt = EncodedPrompt(
        prompt=Prompt(key="k", messages=(), images=(), answer=None, task="t"),
        token_ids=(1, 2),
        pixel_values=None,
        image_grid_thw=None,
    )
    background, reader = Background("replies"), ReplyReader(Decoder(tokenizer))

    async def read(count: int) -> None:
        for _ in range(count):
            for answer in await reader.read(body, asked):
                completion_of(answer, prompt)

    background.run(read(1))  # starts the process
    end = time.perf_counter() + 5.0
    alone = speed(lambda: time.perf_counter() < end)
    began = time.perf_counter()
    under_way = background.start(read(replies))
    beside = speed(lambda: not under_way.done())
    seconds = time.perf_counter() - began
    under_way.result()
    reader.close()
    background.close()
    return beside / alone, seconds


def speed(goes_on: Callable[[], bool]) -> float:
    """Rounds a second."""
    began, rounds = time.perf_counter(), 0
    while goes_on():
        for number in range(1000):
            _ = number * number
        rounds += 1
    return rounds / (time.perf_counter() - began)


def reply(vocab: int) -> tuple[bytes, dict[str, Any]]:
    draw = random.Random(0)
    answers = []
    for _ in range(ANSWERS):
        ids = [draw.randrange(vocab) for _ in range(TOKENS)]
        meta = {
            "output_token_logprobs": [[-draw.random(), token, None] for token in ids],
            "prompt_tokens": 2,
            "finish_reason": {"type": "length", "length": TOKENS},
            "weight_versions": [{"version": "3", "start": 0, "end": TOKENS}],
        }
        answers.append({"text": "", "output_ids": ids, "prompt_token_ids": [1, 2], "meta_info": meta})
    parameters = {"n": ANSWERS, "max_new_tokens": TOKENS, "stop_token_ids": [vocab]}
    return json.dumps(answers).encode(), {"sampling_params": parameters}
