"""Visual questions on scikit-learn's handwritten digits: what `make_shards.py digits` writes."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

CANVAS = 64  # pixels
SPLIT_SEED = 20251120  # fixed: another --seed draws other scenes but never moves a scan to the other split
LARGE = 256  # pixels, of a picture that is looked at twice
CELLS = 8  # along a side of it; one holds the digit
VALIDATION_PART = 5  # every fifth scan is held out
SPLITS = ("train", "validation")


def png_bytes(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=False)
    return buffer.getvalue()


@dataclass(frozen=True, kw_only=True)
class Placed:
    """One scan on the canvas."""

    scan: int  # index in sklearn's data set
    digit: int
    box: tuple[int, int, int, int]  # x1, y1, x2, y2 pixels: the inked part, right and bottom edges exclusive


@dataclass(frozen=True, kw_only=True)
class Scans:
    """The handwritten digits of one split."""

    images: np.ndarray  # [1797, 8, 8] float, ink 0..16
    labels: np.ndarray  # [1797] int
    indices: np.ndarray  # scans that belong to this split

    def draw(self, rng: np.random.Generator, digit: int) -> int:
        return int(rng.choice(self.indices[self.labels[self.indices] == digit]))


@dataclass(frozen=True, kw_only=True)
class Question:
    text: str
    answer: Any
    digits: list[int]  # to show, in drawing order
    target: int | None = None  # position in `digits` whose box is the answer


def ask_digit(rng: np.random.Generator) -> Question:
    digit = int(rng.integers(10))
    return Question(text="Which digit is this?", answer=digit, digits=[digit])


def ask_sum(rng: np.random.Generator) -> Question:
    digits = rng.integers(10, size=2).tolist()
    return Question(text="What is the sum of the digits?", answer=sum(digits), digits=digits)


def ask_count(rng: np.random.Generator) -> Question:
    wanted, count = int(rng.integers(10)), int(rng.integers(0, 3))
    shown = int(rng.integers(2, 4))
    others = [d for d in range(10) if d != wanted]
    digits = [wanted] * count + rng.choice(others, size=shown - count).tolist()
    rng.shuffle(digits)
    return Question(text=f"How many {wanted}s are there?", answer=count, digits=digits)


def ask_largest(rng: np.random.Generator) -> Question:
    digits = rng.integers(10, size=rng.integers(2, 4)).tolist()
    return Question(text="Which digit is the largest?", answer=max(digits), digits=digits)


def ask_where(rng: np.random.Generator) -> Question:
    digits = rng.choice(10, size=int(rng.integers(2, 4)), replace=False).tolist()
    target = int(rng.integers(len(digits)))
    return Question(
        text=f"Where is the {digits[target]}? Give its box in pixels.",
        answer=None,
        digits=digits,
        target=target,
    )


# Reading one digit comes as often as the four questions that build on it together.
DEFAULT_TASKS = ("digit", "sum", "digit", "count", "digit", "largest", "digit", "where")
TASKS: dict[str, Callable[[np.random.Generator], Question]] = {
    "digit": ask_digit,
    "sum": ask_sum,
    "count": ask_count,
    "largest": ask_largest,
    "where": ask_where,
}


def load_scans(split: str) -> Scans:
    """scikit-learn's 1,797 handwritten digits; every fifth of a fixed permutation is validation."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(data.images))
    held_out = np.arange(len(order)) % VALIDATION_PART == 0
    indices = order[held_out] if split == "validation" else order[~held_out]
    return Scans(images=data.images, labels=data.target, indices=np.sort(indices))


def draw_scene(scans: Scans, digits: list[int], rng: np.random.Generator) -> tuple[np.ndarray, list[Placed]]:
    """Grey canvas [64, 64] uint8 with up to four digits on it, each in a quarter of its own."""
    ink = np.zeros((CANVAS, CANVAS))
    placed = []
    quarters = rng.permutation(4)
    half = CANVAS // 2
    for digit, quarter in zip(digits, quarters, strict=False):
        scan = scans.draw(rng, digit)
        size = int(rng.integers(29, half + 1))
        x, y = (int(v) for v in rng.integers(0, half - size + 1, size=2))
        x, y = x + half * int(quarter % 2), y + half * int(quarter // 2)
        scaled = _scale(scans.images[scan] / 16.0, size)
        ink[y : y + size, x : x + size] = scaled
        rows, columns = np.nonzero(scaled.max(axis=1) > 0.25)[0], np.nonzero(scaled.max(axis=0) > 0.25)[0]
        left, right, top, bottom = (int(v) for v in (columns[0], columns[-1], rows[0], rows[-1]))
        box = (x + left, y + top, x + right + 1, y + bottom + 1)
        placed.append(Placed(scan=scan, digit=digit, box=box))
    background, contrast = rng.uniform(0, 50), rng.uniform(150, 205)
    pixels = background + contrast * ink + rng.normal(0, 6, size=ink.shape)
    return np.clip(pixels.round(), 0, 255).astype(np.uint8), placed


def draw_large_scene(scans: Scans, digit: int, rng: np.random.Generator) -> tuple[np.ndarray, Placed]:
    """Grey canvas [256, 256] uint8 with one digit of 14 or 15 pixels on it; its box is that one of 8x8 cells which holds it."""
    cell, margin = LARGE // CELLS, 6
    scan, size = scans.draw(rng, digit), int(rng.integers(14, 16))
    left, top = (cell * int(v) for v in rng.integers(CELLS, size=2))
    x, y = (int(v) for v in rng.integers(margin, cell - size - margin + 1, size=2))
    ink = np.zeros((LARGE, LARGE))
    ink[top + y :, left + x :][:size, :size] = _scale(scans.images[scan] / 16.0, size)
    pixels = 128 + rng.uniform(100, 127) * ink
    placed = Placed(scan=scan, digit=digit, box=(left, top, left + cell, top + cell))
    return pixels.round().astype(np.uint8), placed


def _scale(scan: np.ndarray, size: int) -> np.ndarray:
    image = Image.fromarray(scan.astype(np.float32)).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image, dtype=np.float64)


def digit_sample(index: int, *, scans: Scans, split: str, tasks: list[str], seed: int) -> dict[str, Any]:
    """Sample `index` of a split; tasks take turns."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    task = tasks[index % len(tasks)]
    question = TASKS[task](rng)
    pixels, placed = draw_scene(scans, question.digits, rng)
    answer = question.answer if question.target is None else list(placed[question.target].box)
    return _written(
        index,
        pixels,
        question.text,
        answer=answer,
        task=task,
        response=f"<answer>{_compact(answer)}</answer>",
        meta={
            "scans": [p.scan for p in placed],
            "digits": [p.digit for p in placed],
            "boxes": [list(p.box) for p in placed],
        },
    )


def zoom_sample(index: int, *, scans: Scans, split: str, calls: float, seed: int) -> dict[str, Any]:
    """Sample `index` of a split: a digit too small to read; a share of the reference answers, `calls`, look again first."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    digit = int(rng.integers(10))
    pixels, placed = draw_large_scene(scans, digit, rng)
    box = [1000 * side // LARGE for side in placed.box]
    call = {"name": "zoom_in", "arguments": {"box": box}}
    answer = f"<answer>{digit}</answer>"
    return _written(
        index,
        pixels,
        "Which digit is this?",
        answer=digit,
        task="digit",
        response=[f"<tool_call>{_compact(call)}</tool_call>", answer] if rng.random() < calls else answer,
        meta={"scan": placed.scan, "cell": list(placed.box)},
    )


def _written(index: int, pixels: np.ndarray, question: str, **values: Any) -> dict[str, Any]:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    record = {"messages": [{"role": "user", "content": content}], **values}
    return {"__key__": f"{index:06d}", "png": png_bytes(pixels), "json": json.dumps(record).encode()}


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
