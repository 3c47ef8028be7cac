"""Stage c: whole updates (forward, backward, optimizer) of a slice of Qwen3-VL-30B-A3B, and where their time goes.

FLOPs count active experts and the vision tower, no recomputation (families/cost.py). The tower runs in every update: features
of a frozen one are not kept here, as they are in training.
"""

from __future__ import annotations

import time
from itertools import accumulate
from statistics import median
from typing import TYPE_CHECKING, Any

from tools.bench.card.results import Report

if TYPE_CHECKING:
    from gspo_mm.policy.engine import Policy
    from gspo_mm.types import MicroBatch

_WARM_UP = 3  # updates
_KERNELS = 5
_LARGE = 100 * 2**30  # bytes of a card's memory from which six layers fit with their optimizer

_ROPE = {"rope_type": "default", "rope_theta": 5_000_000.0, "mrope_interleaved": True}
# Qwen3-VL-30B-A3B's config.json, and the same model small enough for a dry run
WIDTHS: dict[str, dict[str, dict[str, Any]]] = {
    "30b": {
        "text": {
            "vocab_size": 151_936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "max_position_embeddings": 262_144,
            "rope_parameters": {**_ROPE, "mrope_section": [24, 20, 20]},
        },
        "vision": {
            "depth": 27,
            "hidden_size": 1152,
            "num_heads": 16,
            "intermediate_size": 4304,
            "out_hidden_size": 2048,
            "patch_size": 16,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        "tokens": {},
    },
    "tiny": {
        "text": {
            "vocab_size": 2048,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 384,
            "max_position_embeddings": 4096,
            "rope_parameters": {**_ROPE, "mrope_section": [12, 10, 10]},
        },
        "vision": {
            "depth": 3,
            "hidden_size": 64,
            "num_heads": 4,
            "intermediate_size": 128,
            "out_hidden_size": 256,
            "patch_size": 16,
            "deepstack_visual_indexes": [0, 1, 2],
        },
        "tokens": {"image_token_id": 2047, "video_token_id": 2046}
        | {"vision_start_token_id": 2045, "vision_end_token_id": 2044},
    },
}


def measure(
    report: Report,
    number_format: str,
    layers: int | None,
    sequences: int,
    length: int,
    patches: int,
    steps: int,
    recompute: str,
    freeze_vision: bool,
    widths: str,
) -> None:
    from gspo_mm.observe.throughput import peak_flops, peak_memory

    policy = build(widths, layers or _layers(), number_format, recompute, freeze_vision)
    batch = make_batch(policy, sequences, length, patches)
    cost = policy.family.flops(policy.hf).training(policy.config.frozen).of_batch(batch)
    report(layers=policy.hf.text_config.num_hidden_layers, tokens=batch.num_tokens)
    report(first_update_s=update(policy, batch))
    for _ in range(_WARM_UP - 1):
        update(policy, batch)
    fastest = median(update(policy, batch) for _ in range(steps))
    report(ms=1000 * fastest, tokens_per_second=batch.num_tokens / fastest, tflops=cost / fastest / 1e12)
    peak = peak_flops()
    mfu = cost / fastest / peak if peak else None  # of the peak in BF16, also where FP8 computes
    if number_format == "bf16":
        report.target("mfu", mfu, 0.40)
    else:
        bf16 = report.beside("slice-bf16", number_format="bf16")
        report(mfu_of_bf16_peak=mfu)
        report.target("times_bf16", bf16["ms"] / (1000 * fastest) if bf16 else None, 1.3)
    report(peak_gib=peak_memory())
    report(kernels=largest_kernels(policy, batch))


def build(widths: str, layers: int, number_format: str, recompute: str, freeze_vision: bool) -> Policy:
    """With random weights, made on the device."""
    import torch
    from transformers import Qwen3VLMoeConfig

    from gspo_mm.config import PolicyConfig
    from gspo_mm.families.table import FAMILIES
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
            "vision_cache_mb": 0,
        }
    )
    check_fp8(config)
    cpu.install()
    plan = ParallelPlan()
    plan.initialize(0)
    dims = WIDTHS[widths]
    text = {"num_hidden_layers": layers, "decoder_sparse_step": 1, "mlp_only_layers": [], **dims["text"]}
    hf = Qwen3VLMoeConfig(
        text_config=text, vision_config=dims["vision"], tie_word_embeddings=False, **dims["tokens"]
    )
    policy = Policy(FAMILIES["qwen3_vl_moe"].family, hf, config, plan, total_steps=1000)
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


def update(policy: Policy, batch: MicroBatch) -> float:
    """Seconds of one update."""
    import torch

    began = time.perf_counter()
    stats = policy.update([batch], lambda _, logprobs_R, __: (-logprobs_R.mean(), {}))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    assert stats.loss == stats.loss, "the loss is NaN"
    return seconds


def largest_kernels(policy: Policy, batch: MicroBatch) -> dict[str, float]:
    """Share of the kernels' time in one update, by kernel, largest first; and `busy`: that time's share of the update's.

    Without a device the same of torch's operations on the host.
    """
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_card = torch.cuda.is_available()
    kind = DeviceType.CUDA if on_card else DeviceType.CPU
    with profile(activities=[ProfilerActivity.CUDA if on_card else ProfilerActivity.CPU]) as profiled:
        seconds = update(policy, batch)
    times = {
        event.key: event.self_device_time_total if on_card else event.self_cpu_time_total
        for event in profiled.key_averages()
        if event.device_type == kind and not getattr(event, "is_user_annotation", False)
    }
    total = sum(times.values())
    largest = sorted(times, key=lambda name: -times[name])[:_KERNELS]
    return {name[:80]: times[name] / total for name in largest} | {"busy": total / 1e6 / seconds}


def _layers() -> int:
    import torch

    return 6 if torch.cuda.get_device_properties(0).total_memory > _LARGE else 3
