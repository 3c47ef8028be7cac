"""How fast are prompts read, against webdataset on the same shards, and does memory stay flat over epochs?

    python tools/bench/data.py --samples 5000 --image-bytes 12000

The sides take turns, epoch by epoch. Rates are per second of processor time, all threads together, so that they are per
core and hold on a busy machine. Nothing is decoded: a prompt is parsed and checked, its image's header read and its
bytes hashed. webdataset's side is `WebDataset(shards)`, with `.shuffle(...)` where ours shuffles; it gives raw samples.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

MIB = 2**20


def main(
    samples: Annotated[int, typer.Option(help="in all shards")] = 5000,
    image_bytes: Annotated[int, typer.Option(help="size of an image, about")] = 12_000,
    per_shard: Annotated[int, typer.Option(help="samples of a shard")] = 1000,
    buffer: Annotated[int, typer.Option(help="shuffle buffer, samples")] = 1000,
    rounds: Annotated[int, typer.Option(help="turns of each side")] = 5,
    epochs: Annotated[int, typer.Option(min=2, help="for the memory")] = 10,
) -> None:
    """Print rates, their ratios and the memory after each epoch."""
    with tempfile.TemporaryDirectory() as folder:
        shards = make_shards(Path(folder), samples, per_shard, image_bytes)
        typer.echo(
            f"{platform.machine()}, {os.cpu_count()} cores; webdataset {version('webdataset')}, Python "
            f"{platform.python_version()}; {samples} samples, {sum(map(os.path.getsize, shards)) / samples:.0f} "
            f"bytes each, {len(shards)} shards"
        )
        rates = measure(sides(shards, buffer), samples, rounds)
        for name, found in rates.items():
            typer.echo(
                f"{name:<34} {median(found):8.0f} /s per core   ({min(found):.0f} to {max(found):.0f})"
            )
        for ours, theirs in (
            ("samples in order", "webdataset in order"),
            ("samples shuffled", "webdataset shuffled"),
            ("samples shuffled, read ahead", "webdataset shuffled"),
            ("prompts shuffled, read ahead", "webdataset shuffled"),
        ):
            ratio = median(a / b for a, b in zip(rates[ours], rates[theirs], strict=True))
            typer.echo(f"{ours} / {theirs}: {ratio:.2f}")
        memory_over(shards, buffer, samples, epochs)


def make_shards(folder: Path, samples: int, per_shard: int, size: int) -> list[str]:
    import numpy as np

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from digit_scenes import png_bytes
    from shard_rows.writing import ShardWriter

    rng = np.random.default_rng(0)
    side = max(8, round((size / 3) ** 0.5))  # noise does not compress

    def made() -> Iterator[dict[str, Any]]:
        for i in range(samples):
            image = png_bytes(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
            content = [{"type": "image"}, {"type": "text", "text": f"What is in picture {i}?"}]
            record = {"messages": [{"role": "user", "content": content}], "answer": i, "task": "noise"}
            yield {"__key__": f"{i:08d}", "png": image, "json": json.dumps(record).encode()}

    with ShardWriter(folder, "bench", samples=per_shard) as writer:
        for sample in made():
            writer.write(sample)
    return [str(path) for path in writer.paths]


def sides(shards: list[str], buffer: int) -> dict[str, Callable[[], Iterable[Any]]]:
    """What takes turns: each gives at least an epoch."""
    import webdataset

    def theirs() -> Any:
        return webdataset.WebDataset(shards, shardshuffle=False, empty_check=False)  # pyright: ignore[reportAttributeAccessIssue]

    return {
        "webdataset in order": theirs,
        "samples in order": lambda: raw(shards, 0),
        "webdataset shuffled": lambda: theirs().shuffle(buffer),
        "samples shuffled": lambda: raw(shards, buffer),
        "samples shuffled, read ahead": lambda: raw(shards, buffer, ahead=True),
        "prompts shuffled": lambda: prompts(raw(shards, buffer)),
        "prompts shuffled, read ahead": lambda: prompts(raw(shards, buffer, ahead=True)),
    }


def raw(shards: list[str], buffer: int, *, ahead: bool = False, repeat: bool = False) -> Iterator[Any]:
    """The stream that `PromptSource` reads."""
    from gspo_mm.data.mixture import Mixture, Source
    from gspo_mm.data.prefetch import Prefetch
    from gspo_mm.data.source import size_of

    mixture = Mixture([Source(name="", shards=shards)], shuffle_buffer=buffer, seed=0, repeat=repeat)
    return Prefetch(mixture, size=size_of, max_bytes=64 * MIB) if ahead else iter(mixture)


def prompts(samples: Iterable[Any]) -> Iterator[Any]:
    """All that `PromptSource` does before it decodes."""
    from gspo_mm.config import DataConfig
    from gspo_mm.data.filters import Filter
    from gspo_mm.data.samples import to_prompt

    accepted = Filter(DataConfig(train=["x"]), training=True)
    for sample, position in samples:
        prompt = to_prompt(sample)
        accepted.check(prompt, position.taken)
        yield prompt


def measure(
    sides: dict[str, Callable[[], Iterable[Any]]], samples: int, rounds: int
) -> dict[str, list[float]]:
    """Samples per second of processor time: {side: one rate a round}, after a round that does not count."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            gc.collect()
            began = time.process_time()
            count = sum(1 for _ in side())
            seconds = time.process_time() - began
            assert count == samples, f"{name} gave {count} of {samples} samples"
            if number:
                rates[name].append(count / seconds)
    return rates


def memory_over(shards: list[str], buffer: int, samples: int, epochs: int) -> None:
    """Resident size after each epoch of one stream that reads ahead."""
    stream = prompts(raw(shards, buffer, ahead=True, repeat=True))
    sizes = []
    for _ in range(epochs):
        for _ in islice(stream, samples):
            pass
        sizes.append(resident() / MIB)
    typer.echo(f"memory after each of {epochs} epochs: {', '.join(f'{size:.0f}' for size in sizes)} MiB")
    typer.echo(f"from the second to the last: {sizes[-1] - sizes[1]:+.1f} MiB")


def resident() -> int:
    """Bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    typer.run(main)
