"""The `gspo-mm` command. Heavy imports happen inside the commands, after the config has been checked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from gspo_mm.commands.before import ConfigPath, Overrides, before_app
from gspo_mm.commands.reward import reward_app
from gspo_mm.runtime.loading import loading
from gspo_mm.runtime.preempt import StopRequest
from gspo_mm.runtime.reporting import run_reporting_faults
from gspo_mm.types import GspoError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="GSPO reinforcement learning for vision-language Mixture-of-Experts models.\n\n"
    "Usual order: [bold]sft[/] (warm start) -> [bold]train[/] (GSPO) -> [bold]report[/]. "
    "Any config key can be set on the command line: train.steps=10 policy.optimizer.lr=1.0e-5\n\n"
    "Relative paths, in configs and on the command line, count from the folder that the command is started in.",
)
app.add_typer(before_app)
app.add_typer(reward_app, name="reward")


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train with GSPO. The same run.name again continues a run that was stopped or killed."""
    stop = StopRequest().listen()
    with loading():
        loaded = _load(config, overrides)
        from gspo_mm.train import train as run

    summary = run(loaded, stop)
    _print_summary(summary, loaded.run.path)


@app.command()
def sft(config: ConfigPath, overrides: Overrides = None) -> None:
    """Supervised warm start on the shards' reference responses; writes RUN/hf for `train` to start from."""
    stop = StopRequest().listen()
    with loading():
        loaded = _load(config, overrides)
        from gspo_mm.sft import sft as run

    summary = run(loaded, stop)
    _print_summary(summary, loaded.run.path)


@app.command()
def serve(config: ConfigPath, overrides: Overrides = None) -> None:
    """Keep rollout.sglang.servers SGLang servers running on this machine for a trainer elsewhere.

    Start it on every rollout machine with the config of the run, where rollout.sglang.start=elsewhere; it finds the
    trainer through the run folder, which both must see, and ends with the run.
    """
    stop = StopRequest("stopping the servers").listen()
    loaded = _load(config, overrides, any_world=True)
    if loaded.rollout.engine != "sglang":
        raise GspoError(f"rollout.engine={loaded.rollout.engine} needs no servers; set rollout.engine=sglang")
    from gspo_mm.runtime.log import setup_logging
    from gspo_mm.serving.serve import serve as run
    from gspo_mm.serving.served import check_served, served

    setup_logging()
    check_served(loaded)
    typer.echo(run(served(loaded), stop))


@app.command()
def preflight(
    config: ConfigPath,
    overrides: Overrides = None,
    everything: Annotated[
        bool,
        typer.Option(
            "--all",
            help="look at the answers of all samples, training and validation, and score their reference answers",
        ),
    ] = False,
) -> None:
    """Read the first prompts and check their answers; with servers, start them and compare them with the policy.

    Servers get the policy's weights, and their log-probs must be the policy's, by position. `train` does the same before
    its first step; here it is done alone, for a new model, machine, version of sglang, data set or reward file.
    """
    loaded = _load(config, overrides)
    from gspo_mm.commands.preflight import preflight_prompts, preflight_servers
    from gspo_mm.runtime.log import setup_logging
    from gspo_mm.sync.parity import table

    rank = int(os.environ.get("RANK", "0"))
    setup_logging(rank=rank)
    if rank == 0:
        typer.echo(preflight_prompts(loaded, everything=everything))
    if not loaded.rollout.serves:
        return
    gaps = preflight_servers(loaded)
    if rank == 0:
        typer.echo(table(gaps))


@app.command("eval")
def evaluate(
    config: ConfigPath,
    overrides: Overrides = None,
    save: Annotated[
        Path | None,
        typer.Option(help="file of JSON lines for every answer: key, task, answer, response, reward, parts"),
    ] = None,
) -> None:
    """Answer the validation shards greedily with model.path and print accuracy by task as JSON.

    Example: gspo-mm eval configs/quickstart.yaml model.path=runs/quickstart-0/hf --save answers.jsonl
    """
    loaded = _load(config, overrides)
    if not loaded.data.validation:
        raise GspoError("data.validation is empty: name the held-out shards to evaluate on")
    from gspo_mm.commands.evaluate import evaluate_folder

    typer.echo(json.dumps(evaluate_folder(loaded, save), indent=1))


@app.command()
def chat(
    model: Annotated[Path, typer.Argument(help="Hugging Face folder, such as RUN/hf")],
    question: Annotated[
        str | None, typer.Argument(help="left out: questions are read from the terminal, line by line")
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="a picture for the first question; several: again")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="after which an answer is cut off", min=1)] = 512,
    temperature: Annotated[float, typer.Option(help="0: the most likely token each time", min=0.0)] = 0.0,
    seed: Annotated[int, typer.Option(help="decides what is drawn, where the temperature is above 0")] = 0,
) -> None:
    """Ask a model, on this machine: what is printed is its answer, as training and evaluation would see it.

    Example: gspo-mm chat runs/quickstart-0/hf --image seven.png "Which digit is this?"
    """
    from gspo_mm.commands.chat import Chat, ask_by_line, pictures_of
    from gspo_mm.types import SamplingParams

    pictures = pictures_of(image or [])
    sampling = SamplingParams(temperature=temperature, max_new_tokens=max_new_tokens)
    with loading():
        conversation = Chat(model, pictures, sampling=sampling, seed=seed)
    if question is None:
        ask_by_line(conversation)
    else:
        typer.echo(conversation.ask(question))


@app.command()
def export(
    source: Annotated[
        Path,
        typer.Argument(help="RUN, RUN/checkpoints/step-..., or a folder of tools/hf_to_megatron.py"),
    ],
    out: Annotated[
        Path, typer.Argument(help="Hugging Face folder to write; it appears only when it is whole")
    ],
    step: Annotated[
        str | None, typer.Option(help="of RUN's checkpoints: a number, best or last; default: last")
    ] = None,
    hf: Annotated[
        Path | None,
        typer.Option(
            help="the folder that the run started from: its tokenizer and dtypes; default: model.path of the run, as it is "
            "seen from the current folder"
        ),
    ] = None,
    experts_layout: Annotated[
        str, typer.Option(help="of --hf: auto, published or transformers; written is the published one")
    ] = "auto",
    fp8: Annotated[
        bool,
        typer.Option(
            "--fp8",
            help="the decoder's matrices in FP8 blocks, experts one by one; SGLang reads them, and transformers but for "
            "Qwen3-VL's experts",
        ),
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="read the result back and compare every bit")
    ] = False,
) -> None:
    """Write a checkpoint as a folder that transformers and SGLang load, adapters merged.

    Memory for a few matrices is enough, and no GPU is used. Killed, the same command goes on with the files that are missing.

    Example: gspo-mm export runs/a a-hf --step 100
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from gspo_mm.checkpoint.origin import checkpoint_of, origin_of

    checkpoint = checkpoint_of(source, step)
    origin = origin_of(checkpoint, hf)
    with loading():
        from gspo_mm.checkpoint.convert import megatron_to_hf

    count = megatron_to_hf(checkpoint, out, hf=origin, experts_layout=experts_layout, fp8=fp8, check=check)
    typer.echo(f"{out}: {count} tensors" + (", every bit checked" if check else ""))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="run folders, such as runs/quickstart")],
    png: Annotated[
        Path | None, typer.Option(help="also draw the curves of all these runs into one picture")
    ] = None,
) -> None:
    """Write RUN/report.html: verdict, curves and answers with their images, in one page that works offline.

    Of several runs also compare.html, beside the first one: their curves over each other.
    """
    from gspo_mm.observe.curves import write_curves_png
    from gspo_mm.observe.metrics import check_run
    from gspo_mm.observe.report import write_comparison, write_report

    for run in runs:
        check_run(run)
        typer.echo(write_report(run))
    if len(runs) > 1:
        typer.echo(write_comparison(runs, runs[0].parent / "compare.html"))
    if png:
        write_curves_png(runs, png)
        typer.echo(png)


@app.command()
def status(
    run: Annotated[Path, typer.Argument(help="a run folder, such as runs/quickstart")],
    as_json: Annotated[bool, typer.Option("--json", help="print everything as JSON")] = False,
) -> None:
    """Say where a run stands: step, speed, reward, servers, checkpoint, restarts, faults. Needs only its folder.

    From any machine that sees the folder, while the run goes on or afterwards.

    Example: watch -n 10 gspo-mm status runs/quickstart
    """
    from gspo_mm.commands.status import show, status_of
    from gspo_mm.commands.tables import table_console

    found = status_of(run)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        show(found, table_console())


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(help="a run folder, such as runs/quickstart")],
    port: Annotated[int, typer.Option(help="of this machine's own address; 0: any", min=0, max=65535)] = 0,
) -> None:
    """Serve a run's report to browsers on this machine, drawn again as the run goes on.

    From elsewhere: ssh -L 8000:localhost:8000 MACHINE, with --port 8000.
    """
    from contextlib import suppress

    from gspo_mm.commands.watch import server_of

    with server_of(run, port) as server, suppress(KeyboardInterrupt):
        typer.echo(f"http://localhost:{server.server_port}  (Ctrl-C ends it)")
        server.serve_forever()


def main() -> None:
    """Entry point of `gspo-mm`."""
    run_reporting_faults(app)


def _load(path: Path, overrides: list[str] | None, *, any_world: bool = False) -> Any:
    from gspo_mm.config import load_config
    from gspo_mm.inputs import check_files

    config = load_config(path, overrides, any_world=any_world)
    check_files(config)
    from gspo_mm.families.folder import read_hf

    read_hf(config.model.path, config.model.experts_layout)
    return config


def _print_summary(summary: dict[str, Any], run: Path) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    for name, value in summary.items():
        if isinstance(value, list | dict):  # sentences, which the log has
            continue
        typer.echo(f"{name:>30}  {value:.4g}" if isinstance(value, float) else f"{name:>30}  {value}")
    typer.echo(f"{'report':>30}  {run / 'report.html'}")


if __name__ == "__main__":
    main()
