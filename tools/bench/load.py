"""Thousands of prompts against a real SGLang server on this machine: is every answer there, and what does the client need?

    python tools/bench/load.py --model data/tiny-model --prompts 2000 --group-size 8
    python tools/make_tiny_model.py data/ends --ends 0.2
    python tools/bench/load.py --model data/ends --prompts 64 --group-size 8 --turns 2 --servers 2

Prompts are pictures of digits, made for the purpose. With `--turns` the model is shown a part of the picture after each turn but
the last; a random model has to be made so that it ends turns. The client's memory is its resident size: before the first prompt,
at its largest, and what the answers themselves take is shown beside it. Every tenth of the work prints a line, so growth shows.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from gspo_mm.environment import Feedback
    from gspo_mm.rollout.sglang import SGLangEngine
    from gspo_mm.types import Completion, EncodedPrompt, Prompt, Turn

MIB = 2**20


def main(
    model: Annotated[Path, typer.Option(help="Hugging Face folder")] = Path("data/tiny-model"),
    prompts: Annotated[int, typer.Option(help="groups to ask for")] = 2000,
    group_size: Annotated[int, typer.Option(help="answers per prompt")] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="longest answer")] = 16,
    max_in_flight: Annotated[int, typer.Option(help="groups asked for at a time")] = 256,
    turns: Annotated[int, typer.Option(help="of an answer, at most")] = 1,
    servers: Annotated[int, typer.Option(help="with more than one, behind sglang-router")] = 1,
) -> None:
    """Print what was asked and answered, how fast, and the client's memory."""
    if not (model / "config.json").is_file():
        raise typer.BadParameter(
            f"{model} is no Hugging Face folder: python tools/make_tiny_model.py {model}"
        )
    with tempfile.TemporaryDirectory() as folder:
        make_shards(folder, prompts)
        config = config_of(folder, model, max_in_flight, max_new_tokens, turns, servers)
        result = run(config, prompts, group_size)
    typer.echo(
        f"\n{platform.machine()}, {os.cpu_count()} cores; sglang {version('sglang')}, torch {version('torch')}"
    )
    for name, value in result.items():
        typer.echo(f"{name:<34} {value}")


def make_shards(folder: str, prompts: int) -> None:
    tool = Path(__file__).parents[1] / "make_shards.py"
    command = [sys.executable, str(tool), "digits", folder, "--train", str(prompts), "--validation", "1"]
    subprocess.run(command, check=True, capture_output=True)


class Looks:
    """The environment of `--turns`: shows a part of the question's picture, each time another."""

    def __init__(self, turns: int) -> None:
        self._turns = turns

    async def step(self, prompt: Prompt, turns: Sequence[Turn]) -> Feedback | None:
        from PIL import Image

        from gspo_mm.environment import Feedback

        if len(turns) == self._turns:
            return None
        with Image.open(BytesIO(prompt.images[0].data)) as picture:
            return Feedback(images=[picture.crop((0, 0, picture.width, picture.height // (1 + len(turns))))])


def config_of(
    folder: str, model: Path, max_in_flight: int, max_new_tokens: int, turns: int, servers: int
) -> Any:
    from gspo_mm.config import parse_config

    server = {
        "servers": servers,
        "mem_fraction": 0.3,
        "max_tokens": 65536,
        "context_length": 512 * turns,
        "start_timeout": 600,
    }
    looks = {"python": "load:Looks", "args": {"turns": turns}, "max_turns": max(turns, 2), "workers": 1}
    return parse_config(
        {
            "run": {"name": "load", "dir": folder},
            "model": {"path": str(model)},
            "data": {"train": [f"{folder}/train-*.tar"], "shuffle_buffer": 0},
            "rollout": {
                "engine": "sglang",
                "max_in_flight": max_in_flight,
                "sampling": {"max_new_tokens": max_new_tokens},
                "environment": looks if turns > 1 else None,
                "sglang": server,
            },
            "reward": {"file": "unused.yaml"},
            "policy": {"dtype": "float32"},
        }
    )


def run(config: Any, count: int, group_size: int) -> dict[str, str]:
    from gspo_mm.data.processor import Processor
    from gspo_mm.data.source import PromptSource
    from gspo_mm.environment.conversation import conversations_of
    from gspo_mm.rollout.sglang import SGLangEngine
    from gspo_mm.serving.fleet import Fleet
    from gspo_mm.sync.sglang import SGLangPush
    from gspo_mm.types import SamplingParams

    processor = Processor(config.model.path, config.data, keep_pixels=False)
    source = PromptSource(config.data, processor, seed=0, split="train")
    prompts = source.take(count)
    conversations = conversations_of(config.rollout, processor)
    engine = SGLangEngine(config, processor, Fleet(config), conversations=conversations)
    try:
        SGLangPush.serve_folder(config, engine)
        before = memory()
        watch = Watch()
        began = time.perf_counter()
        sampling = SamplingParams(**config.rollout.sampling.model_dump())
        groups = ask(engine, prompts, group_size, sampling)
        seconds = time.perf_counter() - began
        largest = watch.stop()
        counts = engine.take_counts()
    finally:
        engine.close()
    return (
        summary(prompts, groups, group_size, seconds)
        | of_turns(groups, counts)
        | {
            "client before": f"{before / MIB:.0f} MiB",
            "client at its largest": f"{largest / MIB:.0f} MiB (+{(largest - before) / MIB:.0f})",
            "client per answer": f"{(largest - before) / count / group_size / 1024:.1f} KiB",
        }
    )


def ask(
    engine: SGLangEngine, prompts: list[EncodedPrompt], group_size: int, sampling: Any
) -> list[list[Completion]]:
    """All at once, as the scheduler does; a line every tenth."""
    began = time.perf_counter()
    futures = [engine.start(prompt, group_size, sampling) for prompt in prompts]
    groups = []
    for number, future in enumerate(futures, start=1):
        groups.append(future.result())
        if number % max(1, len(prompts) // 10) == 0:
            typer.echo(
                f"{number:>6} groups  {time.perf_counter() - began:6.1f} s  {memory() / MIB:6.0f} MiB",
                err=True,
            )
    return groups


def summary(
    prompts: list[EncodedPrompt], groups: list[list[Completion]], group_size: int, seconds: float
) -> dict[str, str]:
    """Raises AssertionError when an answer is missing. That each belongs to its prompt the client has checked by ids."""
    assert len(groups) == len(prompts)
    assert all(len(group) == group_size for group in groups)
    answers = [answer for group in groups for answer in group]
    assert all(len(a.token_ids) == len(a.logprobs) == len(a.versions) > 0 for a in answers)
    tokens = sum(len(answer.token_ids) for answer in answers)
    read = sum(len(prompt.token_ids) for prompt in prompts)
    return {
        "groups asked, answered": f"{len(prompts)}, {len(groups)}",
        "answers, lost": f"{len(answers)}, 0",
        "seconds": f"{seconds:.1f}",
        "answers per second": f"{len(answers) / seconds:.0f}",
        "tokens per second": f"{tokens / seconds:.0f} sampled, {read / seconds:.0f} of prompts",
        "images": str(sum(len(prompt.prompt.images) for prompt in prompts)),
    }


def of_turns(groups: list[list[Completion]], counts: dict[str, float]) -> dict[str, str]:
    """Two answers whose log-probs are the same to the last digit would be one that was counted twice."""
    answers = [answer for group in groups for answer in group]
    drawn = Counter((answer.token_ids, answer.logprobs) for answer in answers if len(answer.token_ids) > 3)
    turns = Counter(len(answer.turns) for answer in answers)
    return {
        "answers by turns": ", ".join(f"{count} of {number}" for number, count in sorted(turns.items())),
        "failed environments, doubled": f"{sum(bool(answer.fault) for answer in answers)}, "
        f"{drawn.total() - len(drawn)}",
        "found in the cache by later turns": f"{counts.get('turns/cached_fraction', 0.0):.1%}",
        "requests sent again": f"{counts['rollout/asked_again']:.0f}",
    }


class Watch:
    """The largest resident size from now on."""

    def __init__(self) -> None:
        self._largest = memory()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._ending.set()
        self._thread.join()
        return self._largest

    def _look(self) -> None:
        while not self._ending.wait(0.05):
            self._largest = max(self._largest, memory())


def memory() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    typer.run(main)
