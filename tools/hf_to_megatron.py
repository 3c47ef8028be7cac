"""Hugging Face folder -> megatron-core distributed checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gspo_mm.cli import run_reporting_faults

app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_show_locals=False)


@app.command()
def main(
    hf: Annotated[
        Path, typer.Argument(help="Hugging Face folder: config.json, *.safetensors, tokenizer ...")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write; it appears only when it is whole.")],
    plan: Annotated[
        str, typer.Option(help="Layout to write under, such as tp=2,ep=2,etp=1; its ranks are started here.")
    ] = "",
    experts_layout: Annotated[str, typer.Option(help="auto, published or transformers.")] = "auto",
    check: Annotated[
        bool, typer.Option("--check", help="Read the result back and compare every bit.")
    ] = False,
) -> None:
    """Convert weights **tensor by tensor**: each rank reads what it holds and writes that.

    The result holds `policy/`, a distributed checkpoint that any layout can read, and `hf/`: configuration, tokenizer,
    processor, chat template, generation config. More ranks need less memory each.

    Examples:

        python tools/hf_to_megatron.py data/tiny-model data/tiny-megatron --check

        python tools/hf_to_megatron.py Qwen3-VL-30B-A3B-Instruct qwen-megatron --plan tp=2,ep=4
    """
    from gspo_mm.families.folder import read_hf
    from gspo_mm.policy.parallel import check_layout
    from gspo_mm.runtime.launch import parse_plan, ranks_needed, start_ranks

    parallel = parse_plan(plan)
    read_hf(hf, experts_layout)
    check_layout(str(hf), parallel, ranks_needed(parallel))
    start_ranks(ranks_needed(parallel))
    from gspo_mm.checkpoint.convert import hf_to_megatron
    from gspo_mm.runtime.dist import Ranks

    count = hf_to_megatron(hf, out, parallel, experts_layout=experts_layout, check=check)
    if Ranks().main:
        typer.echo(f"{out}: {count} tensors" + (", every bit checked" if check else ""))


if __name__ == "__main__":
    run_reporting_faults(app)
