"""How long does it take to score completions with a reward file, in worker processes as a run does it?

    python tools/bench/rewards.py --completions 10000

Answers are lengths, fractions, roots, angles, points and expressions, as in Geometry3K; half of the responses are right,
in ten ways of writing, the others wrong or no answer, and each has some sentences before it. No two problems are alike,
but answers of a group often are. The time is from the first group to the last, workers' start included.
"""

from __future__ import annotations

import os
import platform
import random
import time
from collections.abc import Iterator
from contextlib import closing
from importlib.metadata import version
from typing import Annotated

import typer

from gspo_mm.config import RewardConfig
from gspo_mm.reward.rewards import failed_fraction, load_rewards
from gspo_mm.types import Completion, Finish, Prompt, RolloutGroup

THOUGHT = "The two triangles share an angle, so their sides are in proportion, and $a^2 + b^2 = c^2$ gives the rest. "


def main(
    completions: Annotated[int, typer.Option(help="to score")] = 10_000,
    group_size: Annotated[int, typer.Option(help="completions of one prompt")] = 8,
    file: Annotated[
        str, typer.Option(help="reward file whose task is named geometry")
    ] = "configs/rewards/geometry.yaml",
    workers: Annotated[int, typer.Option(help="processes; 0: one per core")] = 0,
) -> None:
    """Print seconds, completions per second and what the rewards came to."""
    workers = workers or len(os.sched_getaffinity(0))
    groups = list(make_groups(completions, group_size))
    with closing(load_rewards(RewardConfig(file=file, workers=workers), {})) as rewards:
        began = time.perf_counter()
        scored = rewards.score_groups(groups)
        seconds = time.perf_counter() - began
    scores = [score for group in scored for score in group.scores]
    right = sum(score.accuracy == 1.0 for score in scores) / len(scores)
    typer.echo(
        f"{platform.machine()}, {os.cpu_count()} cores; math-verify {version('math-verify')}, Python "
        f"{platform.python_version()}"
    )
    typer.echo(
        f"{len(scores)} completions, {workers} workers: {seconds:.1f} s, {len(scores) / seconds:.0f} /s; "
        f"{right:.1%} right, {failed_fraction(scored):.2%} failed"
    )


def make_groups(completions: int, group_size: int) -> Iterator[RolloutGroup]:
    draw = random.Random(0)
    for number in range(completions // group_size):
        answer, ways = problem(draw)
        texts = [THOUGHT * draw.randrange(1, 8) + response(draw, ways) for _ in range(group_size)]
        yield RolloutGroup(
            id=number,
            prompt=Prompt(key=str(number), messages=(), images=(), answer=answer, task="geometry"),
            prompt_ids=(1,),
            completions=tuple(
                Completion.of_one_turn(
                    token_ids=(1,), logprobs=(0.0,), versions=(0,), finish=Finish.STOP, text=text
                )
                for text in texts
            ),
        )


def problem(draw: random.Random) -> tuple[str, list[str]]:
    """An answer, and ways to write it."""
    n, m = draw.randrange(2, 500), draw.randrange(2, 60)
    tenths = n + draw.randrange(1, 10) / 10
    return draw.choice(
        [
            (str(n), [str(n), f"{n}.0", f"{n}^\\circ", f"x = {n}", f"{n}\\text{{ cm}}"]),
            (str(tenths), [str(tenths), f"\\frac{{{round(tenths * 10)}}}{{10}}", f"{tenths}0"]),
            (
                f"\\frac{{{n}}}{{{m}}}",
                [f"{n}/{m}", f"\\frac{{{2 * n}}}{{{2 * m}}}", f"\\dfrac{{{n}}}{{{m}}}"],
            ),
            (f"{m}\\sqrt{{3}}", [f"{m}\\sqrt{{3}}", f"\\sqrt{{{3 * m * m}}}", f"\\sqrt{{3}} \\cdot {m}"]),
            (f"{n}\\pi", [f"{n}\\pi", f"{n} \\pi", f"\\pi \\times {n}"]),
            (f"({n}, {m})", [f"({n},{m})", f"\\left({n}, {m}\\right)"]),
            (f"{n}x + {m}", [f"{m} + {n}x", f"{n}x+{m}"]),
        ]
    )


def response(draw: random.Random, ways: list[str]) -> str:
    match draw.randrange(8):
        case 0 | 1 | 2 | 3:
            return f"So it is $\\boxed{{{draw.choice(ways)}}}$."
        case 4 | 5:
            wrong, _ = problem(draw)
            return f"So it is $\\boxed{{{wrong}}}$."
        case 6:
            return f"It is \\boxed{{{ways[0]}}} or \\boxed{{{draw.randrange(500)}}}."
        case _:
            return f"I think that it is {ways[0]}."


if __name__ == "__main__":
    typer.run(main)
