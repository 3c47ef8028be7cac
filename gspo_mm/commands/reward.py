"""The face of `gspo-mm reward`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup


class _ScoreFirst(TyperGroup):
    """`gspo-mm reward FILE` is `gspo-mm reward score FILE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["score", *args]
        return super().parse_args(ctx, args)


reward_app = typer.Typer(
    no_args_is_help=True,
    cls=_ScoreFirst,
    help="Check a reward file (reward check FILE), or score saved answers with it (reward FILE --input SAMPLES).",
)


@reward_app.command("check")
def reward_check(files: Annotated[list[Path], typer.Argument(help="reward files with cases:")]) -> None:
    """Run the cases that reward files carry, as tables; status 1 when a score differs from what its case says."""
    from gspo_mm.commands.rescore import check_file
    from gspo_mm.commands.tables import table_console

    passed = [check_file(file, table_console()) for file in files]
    raise typer.Exit(0 if all(passed) else 1)


@reward_app.command("score")
def reward_score(
    file: Annotated[Path, typer.Argument(help="a reward file, or a config that names one")],
    input: Annotated[
        Path,
        typer.Option(
            help="RUN/rollouts/step-*.jsonl.gz, the FILE of `eval --save`, or lines of answer, response and task"
        ),
    ],
    rows: Annotated[int, typer.Option(min=0, help="samples shown one by one")] = 20,
) -> None:
    """Score saved answers and show every part; status 1 when a part failed on some of them."""
    from gspo_mm.commands.rescore import load_answers, rewards_of, score_answers, show_scores
    from gspo_mm.commands.tables import table_console

    answers = list(load_answers(input))
    scores = score_answers(rewards_of(file), [(each.prompt, each.completion) for each in answers])
    show_scores(answers, scores, rows, table_console())
    raise typer.Exit(1 if any(score.error for score in scores) else 0)
