"""What a step costs rank 0 as the world grows: dealing, writing the shares, bytes it sends and holds. Nothing is sent.
With --model also what prompts and pixels cost, and how much of that on the training thread.

    python tools/bench/scale.py --groups 1024

Groups of 16 answers whose lengths are log-normal around --tokens, with --images pictures a prompt; ranks of a machine, and
how many compute one data-parallel rank's share, as options say. Seconds are processor time of this process.

With --real 4,8,16 so many gloo ranks are started here, too: open files of each, and a push of weights (ranks.py).
"""

from __future__ import annotations

import os
import platform
import random
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from gspo_mm.batch import answered, pack, pack_ahead, sequences_of
from gspo_mm.checkpoint.store import Store
from gspo_mm.config import DataConfig
from gspo_mm.data.processor import Processor
from gspo_mm.families.cost import FlopModel
from gspo_mm.policy.parcels import Parcel
from gspo_mm.policy.shares import deal_updates, split_evenly
from gspo_mm.rollout.saved import encode_answers
from gspo_mm.types import Completion, EncodedImage, Finish, Prompt, RolloutGroup, Score, Share

sys.path.insert(0, str(Path(__file__).parents[2]))
from tools.bench.ranks import BUCKETS, LOAD, SERVERS, measured
from tools.bench.replies import ANSWERS, TOKENS, kept

PATCHES = 1280  # of an image: 320 tokens
PHOTO_PROMPTS = 24
# time of a pass over making its pixels: in a step of 60 s pixels took 8.5, two passes most of the rest
COMPUTES = 3
# about that of a mixture with 3 B active parameters
FLOPS = FlopModel(
    token=5 * 10**9, router=25 * 10**6, pair=8 * 10**5, row=6 * 10**8, patch_embedding=4 * 10**6, patch=10**9, patch_pair=10**5,
    merged=10**8, patches_per_token=4,
)  # fmt: skip


def main(
    groups: Annotated[int, typer.Option(help="of a step")] = 128,
    group_size: Annotated[int, typer.Option(help="answers of a prompt")] = 16,
    tokens: Annotated[int, typer.Option(help="mean length of an answer")] = 2048,
    images: Annotated[float, typer.Option(help="mean number of a prompt's pictures")] = 2.5,
    image_kb: Annotated[int, typer.Option(help="bytes of a picture, in thousands")] = 300,
    updates: Annotated[int, typer.Option(help="train.updates_per_batch")] = 4,
    micro_batch_tokens: Annotated[int, typer.Option(help="policy.micro_batch_tokens")] = 16384,
    machine: Annotated[int, typer.Option(help="ranks of a machine")] = 8,
    copies: Annotated[int, typer.Option(help="ranks that compute one share: tp x pp x cp")] = 4,
    worlds: Annotated[str, typer.Option(help="numbers of ranks")] = "8,64,256,1024",
    model: Annotated[Path | None, typer.Option(help="folder with a processor, as data/tiny-model")] = None,
    real: Annotated[str, typer.Option(help="numbers of ranks to start")] = "",
) -> None:
    """Print a table with a row for each world."""
    if model:
        pictures_of_training(model)
        share, seconds = kept(model, replies=groups)
        print(
            f"{groups} replies of {ANSWERS} answers of {TOKENS} tokens were read in {seconds:.1f} s; a loop beside it kept "
            f"{share:.2f} of its speed"
        )
    batch = [make_group(i, group_size, tokens, images, image_kb * 1000) for i in range(groups)]
    began = time.process_time()
    sequences = [sequences_of(part) for part in split_evenly(batch, updates)]
    flat = time.process_time() - began
    everything = [s for update in sequences for s in update]
    text = sum(s.token_ids.nbytes + s.trained.nbytes + len(s.name) for s in everything)
    text += sum(s.rollout_logprobs.nbytes for s in everything if s.rollout_logprobs is not None)
    pictures = {image.key: len(image.data) for group in batch for image in group.prompt.images}
    own = text + sum(pictures.values())
    table = Table(
        title=f"{groups} groups of {group_size}, {len(pictures)} images: {own / 1e6:.0f} MB, {text / 1e6:.0f} of them text; "
        f"made flat in {flat:.2f} s"
    )
    for name in (
        "ranks",
        "dealt, s",
        "written, s",
        "sent / batch",
        "held / batch",
        "ranks per image",
        "at least",
    ):
        table.add_column(name, justify="right")
    for world in map(int, worlds.split(",")):
        dp = max(1, world // copies)
        began = time.process_time()
        shares, _, _ = deal_updates(
            sequences, ranks=dp, max_tokens=micro_batch_tokens, flops=FLOPS, frozen=(), num_patches=lambda _: PATCHES
        )  # fmt: skip
        dealt = time.process_time() - began
        sent, largest, written = sends(shares, world, machine, copies)
        held = largest + sum(map(len, Parcel.of(shares).shares.values()))
        shown = [len(ranks) for ranks in ranks_of_images(shares).values()]
        least = least_ranks(groups, updates, dp)
        table.add_row(
            str(world), f"{dealt:.2f}", f"{written:.2f}", f"{sent / own:.2f}", f"{held / own:.2f}",
            f"{fmean(shown):.1f}" if shown else "-", f"{least:.1f}",
        )  # fmt: skip
    console = Console(width=120)
    console.print(f"{platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}")
    console.print(table)
    thread, beside, size = answers_of_checkpoint(batch)
    console.print(
        f"answers in a checkpoint: {thread:.3f} s on the training thread, {beside:.1f} s beside it, {size / 1e6:.0f} MB"
    )
    for world in map(int, filter(None, real.split(","))):
        files, of_others, seconds = measured(world)
        least = world * BUCKETS * LOAD
        console.print(
            f"{world} gloo ranks: rank 0 has {files} open files, others at most {of_others}; a push to {SERVERS} servers takes "
            f"{seconds:.2f} s, loading alone {least:.2f} s"
        )


def pictures_of_training(model: Path) -> None:
    """Print processor seconds of prompts with two photos each, and what a step's pixels cost the training thread."""
    processors = [
        Processor(
            str(model), DataConfig(train=["x"], max_pixels=2**24, max_prompt_tokens=8192), keep_pixels=keep
        )
        for keep in (True, False)
    ]
    pictures = [photo(seed) for seed in range(2 * PHOTO_PROMPTS)]
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "?"}]
    prompts = [
        Prompt(
            key=f"k/{i}", messages=({"role": "user", "content": content},), images=tuple(pictures[2 * i :][:2]),
            answer=1, task="t",
        )
        for i in range(PHOTO_PROMPTS)
    ]  # fmt: skip
    with_pixels, without = (
        [seconds_of(lambda p=p, each=each: each.encode(p)) for p in prompts] for each in processors
    )
    sequences = [[answered(processors[1].encode(p), [5] * 200)] for p in prompts]
    pixels = [
        seconds_of(lambda m=members: pack(m, processors[1])) for members in sequences[: PHOTO_PROMPTS // 2]
    ]
    began = time.thread_time()
    ahead = pack_ahead(sequences, processors[1], passes=2, waiting=nullcontext)
    for batch in [*ahead, *ahead]:
        batch.pixels()
    thread = time.thread_time() - began
    step = COMPUTES * fmean(pixels) * 2 * len(sequences)
    print(
        f"a prompt with two photos: {fmean(with_pixels) * 1000:.0f} ms of a processor with pixels, {fmean(without) * 1000:.0f} "
        f"without; {len(sequences)} micro-batches packed ahead for two passes: {thread / step:.1%} of a step on the training "
        f"thread, {fmean(pixels) / step:.1%} for the first one's pixels, where the policy computes for {COMPUTES} times as "
        f"long as pixels take; {fmean(pixels) * len(sequences) / step:.1%} when all were made before"
    )


def photo(seed: int) -> EncodedImage:
    """640 x 512 pixels, about 300 kB as JPEG."""
    with BytesIO() as file:
        noise = random.Random(seed).randbytes(3 * 640 * 512)
        Image.frombytes("RGB", (640, 512), noise).save(file, "JPEG", quality=75)
        data = file.getvalue()
    return EncodedImage(data=data, key=EncodedImage.key_of(data), width=640, height=512)


def seconds_of(work: Callable[[], object]) -> float:
    """Of processor time."""
    began = time.process_time()
    work()
    return time.process_time() - began


def answers_of_checkpoint(batch: list[RolloutGroup]) -> tuple[float, float, int]:
    """Seconds before training goes on, seconds of the thread that writes, and bytes, of groups not yet trained on."""
    with TemporaryDirectory() as folder:
        store = Store(Path(folder), keep=1)
        store.begin(1)
        began = time.process_time()
        answers = [encode_answers(group) for group in batch]
        encoded = time.process_time()
        store.write_answers(1, answers)
        size = sum(file.stat().st_size for file in store.temporary(1).iterdir())
        return encoded - began, time.process_time() - encoded, size


def sends(shares: list[list[Share]], world: int, machine: int, copies: int) -> tuple[int, int, float]:
    """(bytes that rank 0 sends, most that it writes for one machine, seconds) where shares are passed on by machines."""
    began = time.process_time()
    parcel = Parcel.of(shares)
    sent = largest = 0
    for first in range(machine, world, machine):
        here = {rank // copies for rank in range(first, min(first + machine, world))}
        size = len(parcel.part(here & parcel.shares.keys()).written())
        sent, largest = sent + size, max(largest, size)
    return sent, largest, time.process_time() - began


def ranks_of_images(shares: list[list[Share]]) -> dict[str, set[int]]:
    """The data-parallel ranks that show each image."""
    found: dict[str, set[int]] = {}
    for rank, of_rank in enumerate(shares):
        for share in of_rank:
            for key in {image.key for members in share.micro_batches for s in members for image in s.images}:
                found.setdefault(key, set()).add(rank)
    return found


def least_ranks(groups: int, updates: int, dp: int) -> float:
    """Ranks that an image needs at least, where every rank takes its part in each update."""
    return max(1.0, dp / (groups / min(groups, updates)))


def make_group(number: int, size: int, tokens: int, images: float, image_bytes: int) -> RolloutGroup:
    rng = random.Random(number)
    count = int(images) + (rng.random() < images % 1)
    pictures = tuple(make_image(number * 10 + i, image_bytes, rng) for i in range(count))
    prompt = Prompt(key=f"digits.tar/{number:06}", messages=(), images=pictures, answer="1", task="t")
    lengths = [int(min(4 * tokens, max(16, rng.lognormvariate(0, 0.6) * tokens))) for _ in range(size)]
    completions = tuple(
        Completion.of_one_turn(
            token_ids=tuple(rng.choices(range(150_000), k=length)),
            logprobs=(-0.5,) * length,
            versions=(0,) * length,
            finish=Finish.STOP,
            text="",
        )
        for length in lengths
    )
    return RolloutGroup(
        id=number,
        prompt=prompt,
        prompt_ids=tuple(range(100 + 320 * count)),
        completions=completions,
        scores=(Score(value=0.0, parts={}),) * size,
        advantages=(0.5,) * size,
    )


def make_image(number: int, size: int, rng: random.Random) -> EncodedImage:
    data = rng.randbytes(size)
    return EncodedImage(data=data, key=EncodedImage.key_of(data), width=512, height=640)


if __name__ == "__main__":
    typer.run(main)
