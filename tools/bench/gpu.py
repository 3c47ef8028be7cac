"""One card: a slice of Qwen3-VL-30B-A3B in BF16 and in FP8, tokens/s, MFU and peak memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from gspo_mm.policy.engine import Policy
    from gspo_mm.types import MicroBatch

app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_show_locals=False)

FORMATS = ["bf16", "tensorwise", "blockwise"]


def slice_config(layers: int) -> Any:
    """Widths, experts, vocabulary and vision tower of Qwen3-VL-30B-A3B (its config.json), fewer decoder layers."""
    from transformers import Qwen3VLMoeConfig

    return Qwen3VLMoeConfig(
        text_config={
            "vocab_size": 151_936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": layers,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "max_position_embeddings": 262_144,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5_000_000.0,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 27,
            "hidden_size": 1152,
            "num_heads": 16,
            "intermediate_size": 4304,
            "out_hidden_size": 2048,
            "patch_size": 16,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        tie_word_embeddings=False,
    )


def build(layers: int, number_format: str, recompute: str, freeze_vision: bool) -> Policy:
    import torch

    from gspo_mm.config import PolicyConfig
    from gspo_mm.families import FAMILIES
    from gspo_mm.policy import cpu
    from gspo_mm.policy.engine import Policy
    from gspo_mm.policy.parallel import ParallelPlan
    from gspo_mm.policy.precision import check_fp8

    config = PolicyConfig.model_validate(
        {
            "dtype": "bfloat16",
            "recompute": recompute,
            "fp8": {"recipe": None if number_format == "bf16" else number_format},
            "freeze": ["vision", "projector"] if freeze_vision else [],
            "optimizer": {"lr": 1e-6},
        }
    )
    check_fp8(config)
    cpu.install()
    plan = ParallelPlan()
    plan.initialize(0)
    policy = Policy(FAMILIES["qwen3_vl_moe"], slice_config(layers), config, plan, total_steps=1000)
    generator = torch.Generator(device=next(policy.parameters()).device).manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
    policy.optimizer.take_over_parameters()
    return policy


def make_batch(policy: Policy, sequences: int, length: int, patches: int) -> MicroBatch:
    """Sequences with one square image each, half of the text trained."""
    import torch

    from gspo_mm.types import MicroBatch

    hf, side = policy.hf, int(patches**0.5) // 2 * 2
    image_tokens = side * side // 4
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(1000, (sequences, length - image_tokens), generator=generator)
    image = torch.full((sequences, image_tokens), hf.image_token_id)
    ids = torch.cat([image, text], dim=1)
    response = (length - image_tokens) // 2
    mask = torch.arange(length) >= length - response
    patch_dim = 3 * 2 * hf.vision_config.patch_size**2
    offsets = list(accumulate([length] * sequences, initial=0))
    responses = list(accumulate([response] * sequences, initial=0))
    return MicroBatch(
        names=tuple(f"sequence {i}" for i in range(sequences)),
        token_ids=ids.flatten(),
        cu_seqlens=torch.tensor(offsets, dtype=torch.int32),
        positions=torch.arange(length).repeat(sequences).expand(3, -1),
        response_mask=mask.repeat(sequences),
        response_cu_seqlens=torch.tensor(responses, dtype=torch.int32),
        advantages=torch.zeros(sequences),
        rollout_logprobs=None,
        pixel_values=torch.randn(sequences * side * side, patch_dim, generator=generator),
        image_grid_thw=torch.tensor([[1, side, side]] * sequences),
        image_keys=tuple(map(str, range(sequences))),
        image_index=torch.arange(sequences),
    )


@app.command()
def one(
    number_format: str,
    layers: int,
    sequences: int,
    length: int,
    patches: int,
    steps: int,
    recompute: str,
    freeze: bool,
) -> None:
    """Measure one number format; a line of JSON. Called by `run`, in a process of its own."""
    import torch

    from gspo_mm.observe.throughput import peak_flops

    policy = build(layers, number_format, recompute, freeze)
    batch = make_batch(policy, sequences, length, patches)
    cost = policy.family.flops(policy.hf).training(policy.config.freeze).of_batch(batch)
    seconds, losses = [], []
    for step in range(steps + 3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        stats = policy.update([batch], lambda _, lp, __: (-lp.mean(), {}))
        torch.cuda.synchronize()
        losses.append(stats.loss)
        if step >= 3:
            seconds.append(time.perf_counter() - began)
    fastest = median(seconds)
    bf16_peak, own_peak = peak_flops(), peak_flops(fp8=number_format != "bf16")
    typer.echo(
        json.dumps(
            {
                "format": number_format,
                "ms": 1000 * fastest,
                "tokens_per_second": batch.num_tokens / fastest,
                "tflops": cost / fastest / 1e12,
                "mfu": cost / fastest / own_peak if own_peak else None,
                "mfu_of_bf16_peak": cost / fastest / bf16_peak if bf16_peak else None,
                "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
                "loss": losses[-1],
            }
        )
    )


@app.command()
def run(
    layers: Annotated[int, typer.Option(help="Decoder layers; 6 fit 141 GB with optimizer.", min=3)] = 6,
    sequences: Annotated[int, typer.Option(help="Sequences in the micro-batch.", min=1)] = 8,
    length: Annotated[int, typer.Option(help="Tokens of a sequence, image tokens included.", min=256)] = 4096,
    patches: Annotated[
        int, typer.Option(help="Patches of a sequence's image, before merging.", min=4)
    ] = 4096,
    steps: Annotated[int, typer.Option(help="Timed updates after three to warm up.", min=1)] = 10,
    recompute: Annotated[str, typer.Option(help="none, selective or full.")] = "selective",
    freeze_vision: Annotated[bool, typer.Option(help="Vision tower and projector frozen.")] = True,
    formats: Annotated[list[str] | None, typer.Option("--format", help=f"Of {', '.join(FORMATS)}.")] = None,
) -> None:
    """Whole updates (forward, backward, optimizer) of a slice of Qwen3-VL-30B-A3B on this card, per number format.

    FLOPs count active experts and the vision tower, no recomputation (batch/cost.py). Targets for one H200: MFU of
    40 % in BF16, FP8 at least 1.3 times as fast.

    Example:

        python tools/bench/gpu.py run --layers 6 --format bf16 --format tensorwise
    """
    import torch

    if not torch.cuda.is_available():
        typer.secho("no CUDA device on this machine: nothing to measure", fg="red", err=True)
        raise typer.Exit(2)
    results: list[dict[str, Any]] = []
    for number_format in formats or FORMATS:
        settings = (number_format, layers, sequences, length, patches, steps, recompute, freeze_vision)
        done = subprocess.run(
            [sys.executable, __file__, "one", *map(str, settings)], capture_output=True, text=True
        )
        if done.returncode:
            typer.secho(f"{number_format}: {done.stderr[-1500:]}", fg="red", err=True)
            continue
        results.append(json.loads(done.stdout.splitlines()[-1]))
    table = Table(title=f"{torch.cuda.get_device_name()}, {layers} layers, {sequences} x {length} tokens")
    for column in ("", "ms / update", "tokens/s", "TFLOP/s", "MFU", "of BF16 peak", "peak GiB"):
        table.add_column(column, justify="right")
    for r in results:
        shares = [f"{r[key]:.1%}" if r[key] else "?" for key in ("mfu", "mfu_of_bf16_peak")]
        numbers = [f"{r['ms']:.0f}", f"{r['tokens_per_second']:,.0f}", f"{r['tflops']:.0f}"]
        table.add_row(r["format"], *numbers, *shares, f"{r['peak_gib']:.1f}")
    Console().print(table)
    typer.echo(json.dumps(results))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    app()
