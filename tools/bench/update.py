"""One optimizer step of the policy alone, against the same model in transformers (eager and SDPA attention)."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from gspo_mm.types import MicroBatch

app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_show_locals=False)

SIDE = 8  # patches of an image's side: 16 image tokens


def make_model(hidden: int, layers: int, vocab: int, folder: Path) -> Path:
    """A random Qwen3-VL-MoE of 16 experts, saved as a Hugging Face folder."""
    import torch
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    config = Qwen3VLMoeConfig(
        text_config={
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": hidden // 8,
            "num_experts": 16,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": hidden // 2 + 16,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [hidden // 16 - 2 * (hidden // 64), hidden // 64, hidden // 64],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 3,
            "hidden_size": 64,
            "num_heads": 2,
            "intermediate_size": 128,
            "out_hidden_size": hidden,
            "patch_size": 4,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1, 2],
        },
        image_token_id=vocab - 4,
        video_token_id=vocab - 3,
        vision_start_token_id=vocab - 2,
        vision_end_token_id=vocab - 1,
    )
    torch.manual_seed(0)
    Qwen3VLMoeForConditionalGeneration(config).float().save_pretrained(folder)
    return folder


def make_batch(model: Any, lengths: list[int]) -> MicroBatch:
    """Packed sequences: an image, a prompt of a third of the rest, a response."""
    import torch

    from gspo_mm.types import MicroBatch

    generator = torch.Generator().manual_seed(1)
    tokens = SIDE * SIDE // 4
    ids: list[list[int]] = []
    prompts: list[int] = []
    for length in lengths:
        text = torch.randint(model.config.text_config.vocab_size - 8, (length - tokens,), generator=generator)
        ids.append([model.config.image_token_id] * tokens + text.tolist())
        prompts.append(tokens + (length - tokens) // 3)
    grids = torch.tensor([[1, SIDE, SIDE]] * len(lengths))
    positions = [
        model.model.get_rope_index(
            torch.tensor([own]),
            (torch.tensor([own]) == model.config.image_token_id).int(),
            image_grid_thw=grids[:1],
        )[0][:, 0]
        for own in ids
    ]
    return MicroBatch(
        names=tuple(map(str, range(len(lengths)))),
        token_ids=torch.tensor([t for own in ids for t in own]),
        cu_seqlens=torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32),
        positions=torch.cat(positions, dim=1),
        response_mask=torch.tensor(
            [i >= p for own, p in zip(ids, prompts, strict=True) for i in range(len(own))]
        ),
        response_cu_seqlens=torch.tensor(
            list(accumulate((n - p for n, p in zip(lengths, prompts, strict=True)), initial=0)),
            dtype=torch.int32,
        ),
        advantages=torch.zeros(len(lengths)),
        rollout_logprobs=None,
        pixel_values=torch.randn(len(lengths) * SIDE * SIDE, 3 * 2 * 16, generator=generator),
        image_grid_thw=grids,
        image_keys=tuple(map(str, range(len(lengths)))),
        image_index=torch.arange(len(lengths)),
    )


def ours(folder: Path, batch: MicroBatch) -> Callable[[], float]:
    from gspo_mm.config import PolicyConfig
    from gspo_mm.policy.engine import Policy

    policy = Policy.from_hf(str(folder), PolicyConfig(dtype="float32"), seed=0, total_steps=1000)
    count = batch.num_response_tokens
    return lambda: policy.update([batch], lambda _, lp, __: (-lp.sum() / count, {})).loss


def theirs(folder: Path, batch: MicroBatch, attention: str) -> Callable[[], float]:
    """A right-padded batch, logits of response tokens only, AdamW and gradient clipping, as trainers do it."""
    import torch
    from transformers import AutoModelForImageTextToText

    model: Any = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.train().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.98), weight_decay=0.0)
    spans = list(pairwise(batch.cu_seqlens.tolist()))
    longest = max(b - a for a, b in spans)
    ids, mask = (torch.zeros(len(spans), longest, dtype=torch.int64) for _ in range(2))
    is_response = torch.zeros(len(spans), longest, dtype=torch.bool)
    positions = torch.zeros(3, len(spans), longest, dtype=torch.int64)
    for row, (a, b) in enumerate(spans):
        ids[row, : b - a], mask[row, : b - a] = batch.token_ids[a:b], 1
        is_response[row, : b - a], positions[:, row, : b - a] = (
            batch.response_mask[a:b],
            batch.positions[:, a:b],
        )
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions,
        "pixel_values": batch.pixel_values,
        "image_grid_thw": batch.image_grid_thw,
        "mm_token_type_ids": (ids == model.config.image_token_id).int(),
    }
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    predicts, targets = is_response[:, 1:].to(device), ids[is_response].to(device)

    def step() -> float:
        hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1][predicts]
        logprobs = model.lm_head(hidden).float().log_softmax(-1).gather(1, targets[:, None])
        loss = -logprobs.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


@app.command()
def main(
    sequences: Annotated[int, typer.Option(help="Sequences of the step, one image each.", min=2)] = 16,
    median_length: Annotated[
        int, typer.Option(help="Tokens of the median sequence; lognormal around it.")
    ] = 120,
    hidden: Annotated[int, typer.Option(help="Hidden size, a multiple of 64.", min=64)] = 256,
    layers: Annotated[int, typer.Option(help="Decoder layers.", min=3)] = 8,
    vocab: Annotated[int, typer.Option(help="Vocabulary.", min=64)] = 4_096,
    repeat: Annotated[
        int, typer.Option(help="Timed steps of each, in turn, after two to warm up.", min=1)
    ] = 7,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: all.", min=0)] = 1,
) -> None:
    """Time whole updates (forward, backward, clipping, AdamW) on equal weights and tokens; the last line is JSON.

    transformers gets a right-padded batch and makes logits for response tokens only; we pack. Losses of the first
    step must agree.

    Example:

        python tools/bench/update.py --sequences 8
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(threads or torch.get_num_threads())
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(sequences, generator=generator) * 0.6
    lengths = (median_length * spread.exp()).long().clamp(40, 8 * median_length).tolist()
    with tempfile.TemporaryDirectory() as folder:
        path = make_model(hidden, layers, vocab, Path(folder))
        from tools.check_parity import load_reference

        reference = load_reference(path)
        batch = make_batch(reference, lengths)
        parameters = sum(p.numel() for p in reference.parameters()) / 1e6
        del reference
        paths = {
            "gspo_mm": ours(path, batch),
            "transformers sdpa": theirs(path, batch, "sdpa"),
            "transformers eager": theirs(path, batch, "eager"),
        }
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    first: dict[str, float] = {}
    for number in range(repeat + 2):
        for name, step in paths.items():
            began = time.perf_counter()
            loss = step()
            first.setdefault(name, loss)
            if number >= 2:
                seconds[name].append(time.perf_counter() - began)
    medians = {name: median(values) for name, values in seconds.items()}
    table = Table(
        title=f"{parameters:.1f} M parameters, {sequences} sequences of {min(lengths)}-{max(lengths)} tokens "
        f"({sum(lengths)} in all), {torch.get_num_threads()} threads"
    )
    for column in ("", "ms / update (median)", "min .. max", "tokens/s", "first loss"):
        table.add_column(column, justify="right")
    for name, values in seconds.items():
        spread_ms = f"{1000 * min(values):.0f} .. {1000 * max(values):.0f}"
        speed = f"{sum(lengths) / medians[name]:,.0f}"
        table.add_row(name, f"{1000 * medians[name]:.0f}", spread_ms, speed, f"{first[name]:.6f}")
    Console().print(table)
    assert max(first.values()) - min(first.values()) < 1e-3, "the three do not compute the same"
    ratios = {
        f"ratio_to_{name.split()[1]}": medians["gspo_mm"] / medians[name] for name in paths if " " in name
    }
    typer.echo(json.dumps({key: round(value, 3) for key, value in ratios.items()}))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    app()
