"""Write WebDataset shards of prompts from a source; `digits` makes visual questions from real handwritten digits.

A sample is its files that share a key inside the tar: `KEY.png` (several images: `KEY.0.png`, `KEY.1.png`, ...) and
`KEY.json` with

    messages   chat messages in Hugging Face's form, {"type": "image"} where an image stands
    answer     what rewards compare with
    task       routes to reward parts
    response   a reference answer in the wanted format, for the supervised warm start only
    meta       anything else; here the indices of the scans and their boxes

Equal arguments give equal bytes, and the first N samples do not depend on how many follow.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_show_locals=False)

CANVAS = 64  # pixels
SPLIT_SEED = 20251120  # fixed: another --seed draws other scenes but never moves a scan to the other split
VALIDATION_PART = 5  # every fifth scan is held out
SPLITS = ("train", "validation")


@app.callback()
def _sources() -> None:
    """Write WebDataset shards of visual questions. Each command is one source of images."""


# --- writing ---------------------------------------------------------------------------------------------------


def write_shards(
    out: Path, name: str, samples: Iterable[dict[str, bytes]], samples_per_shard: int
) -> list[Path]:
    """Write `out/NAME-000000.tar`, ...; a sample is {"__key__": str, suffix: bytes, ...}.

    Shards bear a temporary name until all of them are whole, so a killed run leaves nothing that looks finished.
    """
    out.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    stream = iter(samples)
    while chunk := list(islice(stream, samples_per_shard)):
        path = out / f"{name}-{len(paths):06d}.tar"
        with tarfile.open(_partial(path), "w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in chunk:
                for suffix, data in sample.items():
                    if suffix != "__key__":
                        member = tarfile.TarInfo(
                            f"{sample['__key__']}.{suffix}"
                        )  # mtime 0, owner 0: equal bytes
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
        paths.append(path)
    for path in paths:
        _partial(path).rename(path)
    return paths


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def png_bytes(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=False)
    return buffer.getvalue()


# --- digits ----------------------------------------------------------------------------------------------------


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
    record = {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]},
        ],
        "answer": answer,
        "task": task,
        "response": f"<answer>{json.dumps(answer, separators=(',', ':'))}</answer>",
        "meta": {
            "scans": [p.scan for p in placed],
            "digits": [p.digit for p in placed],
            "boxes": [list(p.box) for p in placed],
        },
    }
    return {"__key__": f"{index:06d}", "png": png_bytes(pixels), "json": json.dumps(record).encode()}


def make_digits(
    out: Path,
    *,
    train: int = 8000,
    validation: int = 500,
    seed: int = 0,
    samples_per_shard: int = 1000,
    tasks: list[str] | None = None,
    force: bool = False,
    on_sample: Callable[[str], None] = lambda split: None,
) -> list[Path]:
    """Write both splits; returns the shards. Raises FileExistsError unless `force`, ValueError for an unknown task."""
    tasks = tasks or list(DEFAULT_TASKS)
    if unknown := [t for t in tasks if t not in TASKS]:
        raise ValueError(f"--tasks names {unknown[0]!r}, which is not one of {', '.join(TASKS)}")
    old = sorted(p for split in SPLITS for p in out.glob(f"{split}-*.tar"))
    if old and not force:
        raise FileExistsError(f"{old[0]} exists; choose another folder or pass --force to replace the shards")

    def samples(split: str, count: int) -> Iterator[dict[str, Any]]:
        scans = load_scans(split)
        for index in range(count):
            yield digit_sample(index, scans=scans, split=split, tasks=tasks, seed=seed)
            on_sample(split)

    counts = {"train": train, "validation": validation}
    written = [
        p
        for split in SPLITS
        for p in write_shards(out, split, samples(split, counts[split]), samples_per_shard)
    ]
    for path in set(old) - set(written):  # a smaller set must not leave shards of the larger one
        path.unlink()
    return written


@app.command()
def digits(
    out: Annotated[
        Path, typer.Argument(help="Folder for train-000000.tar ... and validation-000000.tar ...")
    ],
    train: Annotated[int, typer.Option(min=0, help="Training samples.")] = 8000,
    validation: Annotated[
        int, typer.Option(min=0, help="Held-out samples, drawn from scans never trained on.")
    ] = 500,
    seed: Annotated[
        int, typer.Option(help="Decides scenes and questions; the split of the scans is fixed.")
    ] = 0,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Samples in one tar file.")] = 1000,
    tasks: Annotated[
        str, typer.Option(help="Comma-separated; they take turns, so one named twice comes twice as often.")
    ] = ",".join(DEFAULT_TASKS),
    force: Annotated[bool, typer.Option(help="Replace shards that exist.")] = False,
) -> None:
    """Visual questions on **real handwritten digits** (scikit-learn's 1,797 scans), 64x64 pixels.

    | task | question | answer |
    |---|---|---|
    | digit | Which digit is this? | `<answer>7</answer>` |
    | sum | What is the sum of the digits? (2 shown) | `<answer>15</answer>` |
    | count | How many 3s are there? (2-3 shown, 0-2 wanted) | `<answer>2</answer>` |
    | largest | Which digit is the largest? (2-3 shown) | `<answer>9</answer>` |
    | where | Where is the 7? Give its box in pixels. | `<answer>[36,4,58,29]</answer>` (x1,y1,x2,y2) |

    Train and validation share no scan, whatever the seed.

    Examples:

        python tools/make_shards.py digits data/digits

        python tools/make_shards.py digits data/sums --tasks sum,count --train 20000 --seed 1
    """
    columns = (TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bars = {s: progress.add_task(s, total=n) for s, n in (("train", train), ("validation", validation))}
        try:
            written = make_digits(
                out,
                train=train,
                validation=validation,
                seed=seed,
                samples_per_shard=samples_per_shard,
                tasks=[t.strip() for t in tasks.split(",") if t.strip()],
                force=force,
                on_sample=lambda split: progress.advance(bars[split]),
            )
        except (FileExistsError, ValueError) as error:
            progress.stop()
            typer.secho(str(error), fg="red", err=True)
            raise typer.Exit(1) from None
    typer.echo(f"{out}: {len(written)} shards, {sum(p.stat().st_size for p in written) / 1e6:.1f} MB")


if __name__ == "__main__":
    app()
