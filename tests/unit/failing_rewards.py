"""Reward functions that go wrong in the ways functions do; workers import them by name."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

from gspo_mm.types import Completion, Prompt


def judge(text: str | None, prompt: Prompt, completion: Completion, *, notes: str = "") -> float:
    """What the text says: hang, die, segfault, eat, raise, nan; else 1 for an even number."""
    if notes:
        with Path(notes).open("a") as file:
            file.write(f"{os.getpid()} {text}\n")
    match text:
        case "hang":
            while True:  # not a sleep: nothing in Python interrupts it
                sum(range(10**6))
        case "nap":
            time.sleep(0.7)
            return 1.0
        case "die":
            os._exit(3)
        case "segfault":
            ctypes.string_at(0)
        case "eat":
            return float(len(bytearray(8 * 2**30)) == 0)
        case "raise":
            raise RuntimeError("no idea")
        case "nan":
            return float("nan")
        case _:
            return float(int(text or 1) % 2 == 0)
    raise AssertionError


def sees(text: str | None, prompt: Prompt, completion: Completion) -> float:
    return float(prompt.images[0].data == b"picture")


def even(text, prompt, completion, *, least=0):
    return float(text == str(prompt.answer))


def check_even(prompt, *, least=0):
    if prompt.answer % 2 or prompt.answer < least:
        raise ValueError(f"{prompt.answer!r} is no even number from {least} on")
