"""megatron-core distributed checkpoint -> Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gspo_mm.cli import run_reporting_faults

app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_show_locals=False)


@app.command()
def main(
    checkpoint: Annotated[
        Path, typer.Argument(help="RUN/checkpoints/step-..., or a folder of hf_to_megatron.py.")
    ],
    out: Annotated[
        Path, typer.Argument(help="Hugging Face folder to write; it appears only when it is whole.")
    ],
    hf: Annotated[
        Path | None,
        typer.Option(
            help="The folder that the run started from: its tokenizer and dtypes. [default: model.path of the run, as it "
            "is seen from the current folder]"
        ),
    ] = None,
    plan: Annotated[str, typer.Option(help="Layout to read under, any; its ranks are started here.")] = "",
    experts_layout: Annotated[
        str, typer.Option(help="Of --hf: auto, published or transformers. Written is the published one.")
    ] = "auto",
    check: Annotated[
        bool, typer.Option("--check", help="Read the result back and compare every bit.")
    ] = False,
) -> None:
    """Convert weights **tensor by tensor** into a folder that transformers and SGLang load.

    Examples:

        python tools/megatron_to_hf.py runs/a/checkpoints/step-00000100 a-hf

        python tools/megatron_to_hf.py qwen-megatron qwen-again --plan pp=2 --check
    """
    from gspo_mm.checkpoint.origin import origin_of
    from gspo_mm.runtime.launch import parse_plan, ranks_needed, start_ranks

    parallel, origin = parse_plan(plan), origin_of(checkpoint, hf)
    from gspo_mm.families.write import template_of
    from gspo_mm.policy.parallel import check_layout

    template_of(origin, experts_layout)
    check_layout(str(origin), parallel, ranks_needed(parallel))
    start_ranks(ranks_needed(parallel))
    from gspo_mm.checkpoint.convert import megatron_to_hf
    from gspo_mm.runtime.dist import Ranks

    count = megatron_to_hf(checkpoint, out, parallel, hf=origin, experts_layout=experts_layout, check=check)
    if Ranks().main:
        typer.echo(f"{out}: {count} tensors" + (", every bit checked" if check else ""))


if __name__ == "__main__":
    run_reporting_faults(app)
