"""The face of the commands before a run: a config is made, and looked at without being run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from gspo_mm.runtime.loading import loading
from gspo_mm.types import GspoError

ConfigPath = Annotated[Path, typer.Argument(help="YAML config, for example configs/quickstart.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(help="settings as key=value, stronger than the file")]

before_app = typer.Typer()


@before_app.command()
def init(
    out: Annotated[Path, typer.Argument(help="the config to write, such as my.yaml")],
    model: Annotated[Path, typer.Option(help="Hugging Face folder")],
    data: Annotated[
        list[str],
        typer.Option(
            help="training shards; of a folder its train-*.tar, and its validation-*.tar; several: again"
        ),
    ],
    validation: Annotated[list[str] | None, typer.Option(help="held-out shards")] = None,
    reward: Annotated[
        Path | None, typer.Option(help="reward file; without one, a simple one is written beside the config")
    ] = None,
    gpus: Annotated[
        int,
        typer.Option(help="of the run, shared by trainer and SGLang servers; 0: this machine's CPU", min=0),
    ] = 0,
    gpu: Annotated[str, typer.Option(help="h100, h200, b200, gb200, h800 or h20")] = "h100",
    force: Annotated[bool, typer.Option("--force", help="replace files that are there")] = False,
) -> None:
    """Write a commented config that fits a model and its data: lengths, clip range, learning rate, layout of the GPUs.

    Example: gspo-mm init my.yaml --model models/Qwen3-VL-8B-Instruct --data data/mine --gpus 8 --gpu h100
    """
    with loading():
        from gspo_mm.commands.init import init as run

    typer.echo(
        run(
            out,
            model=model,
            data=data,
            validation=validation or [],
            reward=reward,
            gpus=gpus,
            gpu=gpu,
            force=force,
        )
    )


@before_app.command("import")
def import_config(
    file: Annotated[Path, typer.Argument(help="a Python or shell script, YAML or JSON of another trainer")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="the config to write; default: print it")
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            help="GPUs that it ran on, which the batch sizes of TRL and ms-swift are per; default: what a script says, or 1",
            min=1,
        ),
    ] = None,
) -> None:
    """Translate a config of TRL, Unsloth, ms-swift, verl or AReaL into one of ours; scripts are read, never run.

    Every key is either taken over, with a comment that names it, or listed at the end with the reason why not.

    Example: gspo-mm import grpo.py -o my.yaml --gpus 8
    """
    from gspo_mm.importing import read_source, translated

    if out and out.exists():
        raise GspoError(f"{out} is there already; name another file with -o, or remove it")
    text = translated(read_source(file), gpus=gpus, origin=file.name)
    if out:
        out.write_text(text)
    typer.echo(out or text, nl=out is not None)


@before_app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(help="nodes of the trainer", min=1)] = 1,
    rollout_nodes: Annotated[int, typer.Option(help="nodes of servers; 0: on the trainer's", min=0)] = 0,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs, and so ranks, per node", min=1)] = 8,
    gpu: Annotated[str, typer.Option(help="h100, h200, b200, gb200, h800 or h20")] = "h100",
    prompt: Annotated[
        int | None, typer.Option(help="mean tokens of a prompt, image tokens included", min=1)
    ] = None,
    image: Annotated[int | None, typer.Option(help="of these, mean tokens of images", min=0)] = None,
    answer: Annotated[int | None, typer.Option(help="mean tokens of an answer", min=1)] = None,
    search: Annotated[
        bool, typer.Option("--search", help="try other layouts and splits of the nodes")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print everything as JSON")] = False,
) -> None:
    """Work out memory and time of a run before it is queued; status 1 when it does not fit.

    Needs no GPU and no weights: model.path may hold config.json alone, or be called like a published model. Lengths that
    are not given are shares of the config's limits: a quarter, and half of a prompt an image. How far plans are off:
    tools/bench/plan.py.

    Example: gspo-mm plan configs/qwen3_vl_30b_a3b.yaml --nodes 4 --rollout-nodes 2 --gpu h200
    """
    from gspo_mm.commands import plan as command
    from gspo_mm.commands.tables import table_console
    from gspo_mm.config import load_config
    from gspo_mm.plan.search import search as look
    from gspo_mm.plan.setup import job_of
    from gspo_mm.plan.step import plan_of

    job = job_of(
        load_config(config, overrides, any_world=True),
        nodes=nodes,
        rollout_nodes=rollout_nodes,
        per_node=gpus_per_node,
        gpu=gpu,
        lengths={"prompt": prompt, "image": image, "answer": answer},
    )
    made, found = plan_of(job), look(job, nodes=nodes + rollout_nodes) if search else None
    if as_json:
        typer.echo(json.dumps(command.as_json(made, found or []), indent=1))
    else:
        command.show(made, found, table_console())
    raise typer.Exit(0 if made.fits else 1)


@before_app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(help="YAML config of a run to look at")] = None,
    overrides: Overrides = None,
    ranks: Annotated[
        int | None, typer.Option(help="GPUs that the run is for; default: as few as its layout takes", min=1)
    ] = None,
    sglang_url: Annotated[
        str | None, typer.Option(help="a server to reach, such as http://127.0.0.1:30000")
    ] = None,
) -> None:
    """Show versions, devices and whether SGLang can be reached; with a config, what makes its run fast here, and what not.

    For each way of being faster or smaller it says whether the run has it on this machine and why; `policy.megatron`
    overrides megatron's settings by their names.

    Example: gspo-mm doctor configs/qwen3_vl_30b_a3b.yaml --ranks 16
    """
    from gspo_mm.commands.doctor import doctor as examine
    from gspo_mm.config import load_config

    loaded = load_config(config, overrides, any_world=True) if config else None  # its data may be elsewhere
    raise typer.Exit(examine(sglang_url, config=loaded, ranks=ranks))
