"""Hugging Face folder -> megatron-core distributed checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from gspo_mm.runtime.loading import loading
from gspo_mm.runtime.reporting import run_reporting_faults

app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_show_locals=False)


@app.command()
def main(
    hf: Annotated[
        Path, typer.Argument(help="Hugging Face folder: config.json, *.safetensors, tokenizer ...")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write; it appears only when it is whole.")],
    experts_layout: Annotated[str, typer.Option(help="auto, published or transformers.")] = "auto",
    check: Annotated[
        bool, typer.Option("--check", help="Read the result back and compare every bit.")
    ] = False,
) -> None:
    """Convert weights **expert by expert**: memory for a few matrices is enough, and no GPU is used.

    The result holds `policy/`, a distributed checkpoint that any layout can read, and `hf/`: configuration, tokenizer,
    processor, chat template, generation config. Killed, the same command goes on with the files that are missing.

    Examples:

        python tools/hf_to_megatron.py data/tiny-model data/tiny-megatron --check

        python tools/hf_to_megatron.py Qwen3-VL-30B-A3B-Instruct qwen-megatron
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with loading():
        from gspo_mm.checkpoint.convert import hf_to_megatron

    count = hf_to_megatron(hf, out, experts_layout=experts_layout, check=check)
    typer.echo(f"{out}: {count} tensors" + (", every bit checked" if check else ""))


if __name__ == "__main__":
    run_reporting_faults(app)
