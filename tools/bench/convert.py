"""What a conversion costs beside `cp` of the same bytes: seconds, processor time, memory; and that kills lose nothing.

    python tools/bench/convert.py --layers 3 --kills 5

A random checkpoint with the names and sizes of Qwen3-VL-30B-A3B and --layers decoder layers (3: 6.1 GB, 15: 21 GB) is
copied, converted there and back, and every bit compared (`--check`, not counted in the times). Each takes turns with `cp`,
with a `sync` behind both. Memory of a process: RssAnon, what no file backs, sampled 100 times a second, and VmHWM, which
also counts what it has mapped of files and the system may drop at any time. The folder takes three times the checkpoint, and
twice with --no-keep-source; it is removed at the end.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import torch
import typer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from gspo_mm.families.published import PUBLISHED  # noqa: E402
from gspo_mm.families.table import family_of  # noqa: E402
from gspo_mm.hf.shard import ShardWriter  # noqa: E402

GB = 10**9
BLOCK = 2**20  # random numbers that weights are made of


def main(
    layers: Annotated[
        int, typer.Option(help="decoder layers, 1.2 GB each; 2.5 GB are beside them", min=1)
    ] = 3,
    kills: Annotated[int, typer.Option(help="kill each direction so often, at random points", min=0)] = 0,
    folder: Annotated[Path | None, typer.Option(help="where to work; default: the system's")] = None,
    keep_source: Annotated[bool, typer.Option(help="while converting back")] = True,
) -> None:
    """Print a table of both directions and of `cp`."""
    with tempfile.TemporaryDirectory(dir=folder) as made:
        source, megatron, back = (Path(made) / name for name in ("source", "megatron", "back"))
        make_model(source, layers)
        size = sum(file.stat().st_size for file in source.iterdir())
        typer.echo(f"{size / GB:.1f} GB, {os.cpu_count()} cores, torch {torch.__version__}\n")
        typer.echo(
            "| | seconds | of cp | processor s | of cp | RssAnon (GB) | VmHWM (GB) |\n|---|---|---|---|---|---|---|"
        )
        to_megatron = [sys.executable, "tools/hf_to_megatron.py", str(source), str(megatron)]
        to_hf = [sys.executable, "-m", "gspo_mm.cli", "export", str(megatron), str(back)]
        for name, command, begin in (("to megatron", to_megatron, source), ("to HF", to_hf, megatron)):
            copy = measured(["cp", "-r", str(begin), str(Path(made) / "copy")])
            shutil.rmtree(Path(made) / "copy")
            row("cp", copy, copy)
            out = Path(command[-1])
            row(name, measured(command), copy)
            shutil.rmtree(out)
            points = random.Random(len(name))
            for share in sorted(points.random() for _ in range(kills)):
                kill(command, share * size)
            done = subprocess.run([*command, "--check"], cwd=ROOT, text=True, capture_output=True, check=True)
            typer.echo(f"{done.stdout.strip()} {done.stderr.strip().splitlines()[-1]}", err=True)
            if name == "to megatron" and not keep_source:
                shutil.rmtree(source)


def make_model(path: Path, layers: int) -> None:
    """Weights of random bits in the published layout, and a config.json."""
    path.mkdir()
    sizes = json.loads(json.dumps(PUBLISHED["qwen3-vl-30b-a3b"]))
    sizes["text_config"] |= {
        "num_hidden_layers": layers,
        "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20]},
    }
    (path / "config.json").write_text(json.dumps(sizes))
    family = family_of(path)
    hf = family.load_config(str(path))
    with torch.device("meta"):
        tensors = family.auto_class(hf).from_config(hf).state_dict()
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight_map = {}
    for number, names in enumerate([list(tensors)[i::4] for i in range(4)]):
        file = f"model-{number + 1:05d}-of-00004.safetensors"
        with ShardWriter(path / file, room=2**18) as shard:
            for name in names:
                shape = tensors[name].shape
                if ".experts." in name:
                    shape = (shape[0], shape[2], shape[1])
                count = torch.Size(shape).numel()
                shift = hash(name) % 1000
                values = block.roll(shift).repeat(-(-count // BLOCK))[:count]
                shard.add(name, [values.view(shape)])
                weight_map[name] = file
            shard.finish()
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


type Cost = tuple[float, float, float, float]  # wall and processor seconds, peak bytes by RssAnon and VmHWM


def measured(command: list[str]) -> Cost:
    """With a `sync` at the end. Raises CalledProcessError."""
    os.sync()
    before, began = os.times(), time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    anonymous = most = 0
    while process.poll() is None:
        try:
            status = dict(
                re.findall(
                    r"^(RssAnon|VmHWM):\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text(), re.M
                )
            )
        except OSError:
            break
        anonymous, most = (
            max(anonymous, int(status.get("RssAnon", 0))),
            max(most, int(status.get("VmHWM", 0))),
        )
        time.sleep(0.01)
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, command)
    os.sync()
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return time.monotonic() - began, used, anonymous * 1024, most * 1024


def row(name: str, cost: Cost, copy: Cost) -> None:
    wall, used, anonymous, most = cost
    typer.echo(
        f"| {name} | {wall:.1f} | {wall / copy[0]:.2f} | {used:.1f} | {used / copy[1]:.2f} | {anonymous / GB:.2f} "
        f"| {most / GB:.2f} |"
    )


def kill(command: list[str], size: float) -> None:
    """Run a command and kill it when, with what an earlier one left, so many bytes are written."""
    out = Path(command[-1])
    rest = out.with_name(f".tmp-{out.name}")
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and written(rest) < size:
        time.sleep(0.02)
    process.kill()
    process.wait()
    whole = len([path for path in rest.rglob("*.json") if path.parent.name == ".parts"]) - 1
    typer.echo(f"killed with {written(rest) / GB:.1f} GB written, {whole} files whole", err=True)


def written(folder: Path) -> int:
    size = 0
    for path in list(folder.rglob("*")):
        if path.suffix in (".half", ".distcp", ".safetensors"):
            with suppress(FileNotFoundError):  # a half-written file that is whole by now
                size += path.stat().st_size
    return size


if __name__ == "__main__":
    typer.run(main)
