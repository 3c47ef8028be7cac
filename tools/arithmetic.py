"""Sums and differences of whole numbers, as text: prompts for models that see no images.

A question is in train or in validation, whatever the seed: every fifth of a fixed order is held out.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
from shard_rows.writing import SPLITS

VALIDATION_PART = 5
SIGNS = {"add": "+", "subtract": "-"}


def arithmetic_sample(
    index: int, *, split: str, tasks: list[str], smallest: int, largest: int, seed: int
) -> dict[str, Any]:
    """Sample `index` of a split, of numbers from `smallest` to `largest`; tasks take turns."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    task = tasks[index % len(tasks)]
    while True:
        a, b = rng.integers(smallest, largest, size=2, endpoint=True).tolist()
        question = f"{a} {SIGNS[task]} {b} ="
        if split_of(question) == split:
            break
    answer = a + b if task == "add" else a - b
    record = {
        "messages": [{"role": "user", "content": question}],
        "answer": answer,
        "task": task,
        "response": f"<answer>{answer}</answer>",
    }
    return {"__key__": f"{index:06d}", "json": json.dumps(record).encode()}


def split_of(question: str) -> str:
    digest = hashlib.sha256(question.encode()).digest()
    return "validation" if digest[0] % VALIDATION_PART == 0 else "train"
