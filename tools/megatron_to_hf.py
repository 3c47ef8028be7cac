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
        typer.Option(help="The folder that the run started from (model.path): its tokenizer and dtypes."),
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

        python tools/megatron_to_hf.py runs/a/checkpoints/step-00000100 a-hf --hf Qwen3-VL-30B-A3B-Instruct

        python tools/megatron_to_hf.py qwen-megatron qwen-again --plan pp=2 --check
    """
    from gspo_mm.checkpoint.distributed import CheckpointError
    from gspo_mm.policy.parallel import check_layout
    from gspo_mm.runtime.launch import parse_plan, ranks_needed, start_ranks

    parallel = parse_plan(plan)
    if not (checkpoint / "policy").is_dir():
        raise CheckpointError(
            f"{checkpoint} has no policy/ in it; name a checkpoint such as RUN/checkpoints/step-00000100"
        )
    if hf or (checkpoint / "hf").is_dir():
        check_layout(str(hf or checkpoint / "hf"), parallel, ranks_needed(parallel))
    start_ranks(ranks_needed(parallel))
    from gspo_mm.checkpoint.convert import megatron_to_hf
    from gspo_mm.runtime.dist import Ranks

    count = megatron_to_hf(checkpoint, out, parallel, hf=hf, experts_layout=experts_layout, check=check)
    if Ranks().main:
        typer.echo(f"{out}: {count} tensors" + (", every bit checked" if check else ""))


if __name__ == "__main__":
    run_reporting_faults(app)
