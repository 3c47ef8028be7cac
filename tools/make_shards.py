"""Write WebDataset shards of prompts from a data set, from scikit-learn's handwritten digits, or of sums.

A sample is its files that share a key inside the tar: `KEY.0.png`, `KEY.1.jpg`, ... (one picture may be `KEY.png`) and
`KEY.json` with

    messages   chat messages in Hugging Face's form, {"type": "image"} where an image stands
    answer     what rewards compare with
    task       routes to reward parts
    response   a reference answer in the wanted format, for the supervised warm start only
    meta       anything else that rewards or you want to see
    images     names of the picture members in their order, where they bear no numbers

Equal arguments give equal bytes, whatever the number of processes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from arithmetic import SIGNS, arithmetic_sample
from digit_scenes import DEFAULT_TASKS, TASKS, digit_sample, load_scans, zoom_sample
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from shard_rows.rows import Columns
from shard_rows.tables import Form, SourceError, open_source
from shard_rows.writing import SPLITS, Report, ShardWriter, write_rows

from gspo_mm.reward.grounding import Unit

app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_show_locals=False)

REFUSED = "refused.jsonl"
BARS = (
    SpinnerColumn(),
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
)

Out = Annotated[Path, typer.Argument(help="Folder for train-000000.tar ... and validation-000000.tar ...")]
SamplesPerShard = Annotated[int, typer.Option(min=1, help="Samples in one tar file, at most.")]
Train = Annotated[int, typer.Option(min=0, help="Training samples.")]
Tasks = Annotated[
    str, typer.Option(help="Comma-separated; they take turns, so one named twice comes twice as often.")
]
Force = Annotated[bool, typer.Option(help="Replace shards that exist.")]


@app.callback()
def _sources() -> None:
    """Write WebDataset shards of prompts. Each command is one kind of source.

    The formats of TRL, verl, ms-swift, slime, LLaVA and LLaMA-Factory are read as they are: see
    `tools/shard_rows/rows.py`. Rows that cannot be trained on are left out, counted and named in OUT/refused.jsonl.
    """


@app.command()
def rows(
    source: Annotated[
        str, typer.Argument(help="A .jsonl, .json, .csv or .parquet file, a glob of them, or see --format.")
    ],
    out: Out,
    form: Annotated[
        Form | None,
        typer.Option(
            "--format", help="hf: a folder of `datasets`, or NAME on the hub. [default: by the name]"
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Which split of an hf data set.")] = "train",
    prompt: Annotated[
        str | None, typer.Option(help="Column of messages or text. [default: the first known one]")
    ] = None,
    image: Annotated[
        str, typer.Option(help="Column of one image or several; several columns with commas, in their order.")
    ] = "",
    answer: Annotated[
        str | None, typer.Option(help="Column of the answer; a.b leads into an object.")
    ] = None,
    response: Annotated[
        str | None, typer.Option(help="Column of a reference answer, for the warm start only.")
    ] = None,
    task_column: Annotated[str | None, typer.Option(help="Column of the task.")] = None,
    task: Annotated[str, typer.Option(help="Task of rows without a column of it.")] = "default",
    meta: Annotated[
        str, typer.Option(help="Comma-separated columns to keep as meta; null in rows that lack them.")
    ] = "",
    ignore: Annotated[
        str, typer.Option(help="Comma-separated columns, of pictures or video for example, to leave out.")
    ] = "",
    system: Annotated[
        str | None, typer.Option(help="System message to put in front of every prompt.")
    ] = None,
    box_unit: Annotated[
        Unit | None,
        typer.Option(
            help="Unit in which your model gives boxes, for rows with ms-swift's objects: thousandths of the picture "
            "(Qwen3-VL), its pixels, or shares of one."
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder where relative image paths begin. [default: that of the source]"),
    ] = None,
    validation: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Fraction of the pictures to hold out; rows that share one are in one split. Takes the room of the "
            "shards twice while it runs.",
        ),
    ] = 0.0,
    samples_per_shard: SamplesPerShard = 1000,
    shard_mb: Annotated[
        float, typer.Option(min=0.001, help="Megabytes after which a tar file is full.")
    ] = 500.0,
    compress: Annotated[
        bool, typer.Option(help="Write .tar.gz: smaller with text, not with pictures.")
    ] = False,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that read and check pictures.")
    ] = os.cpu_count() or 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows to read at most.")] = None,
    force: Force = False,
) -> None:
    """Prompts from the **rows of a data set**: JSON lines, CSV, parquet, or Hugging Face `datasets`.

    The formats of TRL, verl, ms-swift, slime, LLaVA (ShareGPT) and LLaMA-Factory are read as they are. Known names:

    | what | columns |
    |---|---|
    | prompt | messages, conversations, prompt, problem, question, query, instruction: messages or text with `<image>` in it |
    | before it | system, history |
    | images | images, image: paths, `{bytes, path}`, data: URLs |
    | answer | answer, solution, label, ground_truth, reward_model.ground_truth |
    | task | task, ability |
    | reference answer, and the answer of rows without one | the assistant's last message; response, completion, output |

    Rows that cannot be trained on are left out, counted, and named in OUT/refused.jsonl; so are rows with pictures, video
    or sound in a column that is neither read nor ignored. Other columns that nothing reads are listed at the end.

    Examples:

        python tools/make_shards.py rows questions.jsonl data/mine --validation 0.02

        python tools/make_shards.py rows pairs.csv data/pairs --image before,after --ignore clip

        python tools/make_shards.py rows geo3k/train.parquet data/geo3k --task geometry

        python tools/make_shards.py rows hiyouga/geometry3k data/geo3k --format hf --split train
    """
    columns = Columns(
        prompt=prompt,
        images=names_in(image),
        answer=answer,
        task=task_column,
        response=response,
        meta=names_in(meta),
        ignore=names_in(ignore),
        system=system,
        box_unit=box_unit,
    )
    try:
        old = existing(out, force=force)
        found = open_source(source, form, split)
        with Progress(*BARS, console=Console(stderr=True)) as progress:
            bar = progress.add_task("rows", total=limit or found.total)
            report = write_rows(
                islice(found.rows, limit),
                out,
                columns,
                folder=images or found.folder,
                task=task,
                validation=validation,
                samples=samples_per_shard,
                megabytes=shard_mb,
                compressed=compress,
                workers=workers,
                on_row=lambda: progress.advance(bar),
            )
    except SourceError as error:
        typer.secho(str(error), fg="red", err=True)
        raise typer.Exit(1) from None
    replace(out, old, report.paths)
    (out / REFUSED).unlink(missing_ok=True)
    if report.examples:
        lines = [json.dumps(example, ensure_ascii=False) for example in report.examples]
        (out / REFUSED).write_text("\n".join(lines) + "\n")
    tell(report, out)
    if not report.written.total():
        raise typer.Exit(1)


def names_in(text: str) -> tuple[str, ...]:
    """Of a list with commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def existing(out: Path, *, force: bool) -> list[Path]:
    """Shards that are there already. Raises SourceError unless they may be replaced."""
    old = sorted(path for split in SPLITS for path in out.glob(f"{split}-*.tar*"))
    if old and not force:
        raise SourceError(f"{old[0]} exists; choose another folder or pass --force to replace the shards")
    return old


def tell(report: Report, out: Path) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for split in SPLITS:
        table.add_row(split, f"{report.written[split]:,} samples")
    table.add_row("images", f"{report.images:,}")
    size = sum(path.stat().st_size for path in report.paths)
    table.add_row("shards", f"{len(report.paths)}, {size / 1e6:.1f} MB, in {out}")
    if report.largest_set * 20 > report.rows:
        shared = f"{report.largest_set:,} rows are in one split, since they share pictures with each other"
        table.add_row("", shared)
    for name, count in report.unused.most_common():
        table.add_row(f"not used: {name}", f"in {count:,} rows; --meta {name} keeps it")
    for reason, count in report.refused.most_common():
        first = next(example for example in report.examples if example["reason"] == reason)
        table.add_row(f"refused: {reason}", f"{count:,}, first row {first['row']}: {first['detail'][:160]}")
    if report.refused:
        table.add_row("", f"particulars in {out / REFUSED}")
    Console().print(table)


def replace(out: Path, old: list[Path], new: list[Path]) -> None:
    """Remove shards of a larger set that stood there before."""
    for path in set(old) - set(new):
        path.unlink()


@app.command()
def digits(
    out: Out,
    train: Train = 8000,
    validation: Annotated[
        int, typer.Option(min=0, help="Held-out samples, drawn from scans never trained on.")
    ] = 500,
    seed: Annotated[
        int, typer.Option(help="Decides scenes and questions; the split of the scans is fixed.")
    ] = 0,
    samples_per_shard: SamplesPerShard = 1000,
    tasks: Tasks = ",".join(DEFAULT_TASKS),
    force: Force = False,
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
    names = known(tasks, TASKS)
    make = {
        split: partial(digit_sample, scans=load_scans(split), split=split, tasks=names, seed=seed)
        for split in SPLITS
    }
    write(out, make, (train, validation), samples_per_shard, force=force)


@app.command()
def zoom(
    out: Out,
    train: Train = 8000,
    validation: Annotated[
        int, typer.Option(min=0, help="Held-out samples, drawn from scans never trained on.")
    ] = 500,
    calls: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the reference answers that call zoom_in first.")
    ] = 0.5,
    seed: Annotated[int, typer.Option(help="Decides scenes; the split of the scans is fixed.")] = 0,
    samples_per_shard: SamplesPerShard = 1000,
    force: Force = False,
) -> None:
    """Handwritten digits **too small to read**: 14 or 15 pixels of a picture of 256x256, which models see at 64x64.

    Half of the reference answers look again, at the eighth of the picture that holds the digit; the others say it at once:

        <tool_call>{"name":"zoom_in","arguments":{"box":[250,500,375,625]}}</tool_call>

        <answer>7</answer>

    Train and validation share no scan, whatever the seed.

    Examples:

        python tools/make_shards.py zoom data/zoom

        python tools/make_shards.py zoom data/zoom-direct --calls 0
    """
    make = {
        split: partial(zoom_sample, scans=load_scans(split), split=split, calls=calls, seed=seed)
        for split in SPLITS
    }
    write(out, make, (train, validation), samples_per_shard, force=force)


@app.command()
def arithmetic(
    out: Out,
    train: Train = 8000,
    validation: Annotated[
        int, typer.Option(min=0, help="Held-out samples, of other pairs of numbers.")
    ] = 500,
    smallest: Annotated[int, typer.Option(help="The smallest number in a question.")] = 0,
    largest: Annotated[int, typer.Option(help="The largest number in a question.")] = 99,
    seed: Annotated[int, typer.Option(help="Decides the questions; which ones are held out is fixed.")] = 0,
    samples_per_shard: SamplesPerShard = 1000,
    tasks: Tasks = ",".join(SIGNS),
    force: Force = False,
) -> None:
    """Questions **without images**, for models that take text alone.

    | task | question | answer |
    |---|---|---|
    | add | 17 + 25 = | `<answer>42</answer>` |
    | subtract | 17 - 25 = | `<answer>-8</answer>` |

    Examples:

        python tools/make_shards.py arithmetic data/arithmetic

        python tools/make_shards.py arithmetic data/sums --tasks add --smallest 100 --largest 999
    """
    names = known(tasks, SIGNS)
    if largest - smallest < 9:
        fail(f"--smallest {smallest} --largest {largest} leaves too few questions; choose 10 numbers or more")
    make = {
        split: partial(
            arithmetic_sample, split=split, tasks=names, smallest=smallest, largest=largest, seed=seed
        )
        for split in SPLITS
    }
    write(out, make, (train, validation), samples_per_shard, force=force)


def known(tasks: str, all_tasks: Iterable[str]) -> list[str]:
    names = list(names_in(tasks))
    if unknown := [name for name in names if name not in all_tasks]:
        fail(f"--tasks names {unknown[0]!r}, which is not one of {', '.join(all_tasks)}")
    return names


def fail(reason: str) -> NoReturn:
    typer.secho(reason, fg="red", err=True)
    raise typer.Exit(1)


def write(
    out: Path,
    make: Mapping[str, Callable[[int], dict[str, Any]]],
    counts: tuple[int, int],
    samples: int,
    *,
    force: bool,
) -> None:
    """Shards of so many samples of each split, made by number."""
    try:
        old = existing(out, force=force)
    except SourceError as error:
        fail(str(error))
    written: list[Path] = []
    with Progress(*BARS, console=Console(stderr=True)) as progress, ExitStack() as stack:
        for split, count in zip(SPLITS, counts, strict=True):
            writer = stack.enter_context(ShardWriter(out, split, samples=samples))
            for index in progress.track(range(count), description=split):
                writer.write(make[split](index))
            written += writer.paths
    replace(out, old, written)
    typer.echo(f"{out}: {len(written)} shards, {sum(p.stat().st_size for p in written) / 1e6:.1f} MB")


if __name__ == "__main__":
    app()
