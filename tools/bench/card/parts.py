"""What is measured: parts of stages a to e, their deadlines, and their settings on a card and in a dry run.

The deadlines of a stage together are at most 8 minutes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

STAGES = {
    "a": "environment",
    "b": "parity of a tiny model",
    "c": "a slice of Qwen3-VL-30B-A3B",
    "d": "weights to an SGLang server on the same card",
    "e": "the digits quick start on the card",
}
LIMIT = 480  # seconds of a stage


@dataclass(frozen=True, kw_only=True)
class Part:
    """Runs `function` of tools/bench/card/MODULE.py in a process of its own."""

    stage: str
    name: str
    function: str  # "module.function"
    deadline: int  # seconds
    settings: dict[str, Any] = field(default_factory=dict)
    dry: dict[str, Any] = field(default_factory=dict)  # settings of a dry run, over the others
    te: bool = False  # whether it needs Transformer Engine

    def settings_of(self, *, dry: bool) -> dict[str, Any]:
        return {**self.settings, **(self.dry if dry else {})}


def _gemm(recipe: str | None) -> Part:
    size = {"rows": 16384, "inner": 4096, "outer": 4096, "repeats": 50}
    return Part(
        stage="a",
        name=f"gemm-{recipe or 'bf16'}",
        function="environment.gemm",
        deadline=90,
        settings={"recipe": recipe, **size},
        dry={"rows": 128, "inner": 256, "outer": 256, "repeats": 2},
        te=True,
    )


def _parity(number_format: str) -> Part:
    return Part(
        stage="b",
        name=f"parity-{number_format}",
        function="parity.measure",
        deadline=120,
        settings={"number_format": number_format, "updates": 3},
        te=True,
    )


def _slice(number_format: str) -> Part:
    return Part(
        stage="c",
        name=f"slice-{number_format}",
        function="slices.measure",
        deadline=160,
        # layers: 3 fit 80 GB with optimizer, 6 fit 141 GB
        settings={"number_format": number_format, "layers": None, "sequences": 8, "length": 4096}
        | {"patches": 4096, "steps": 10, "recompute": "selective", "freeze_vision": True, "widths": "30b"},
        dry={"layers": 3, "sequences": 2, "length": 128, "patches": 64, "steps": 1, "widths": "tiny"},
        te=True,
    )


def _push(mode: str) -> Part:
    return Part(
        stage="d",
        name=f"push-{mode}",
        function="servers.measure",
        deadline=240,
        settings={"mode": mode, "gb": 3.0, "pushes": 5, "bucket_mb": 512, "dtype": "bfloat16"}
        # heads of a size that attention kernels have
        | {"mem_fraction": 0.2, "attention_backend": "fa3", "max_gap": 0.1, "text": {"head_dim": 64}},
        dry={"gb": 0.03, "pushes": 1, "bucket_mb": 16, "dtype": "float32", "attention_backend": None}
        | {"max_gap": 1e-4, "text": {"head_dim": 64, "hidden_size": 256, "moe_intermediate_size": 384}},
    )


PARTS = [
    Part(stage="a", name="machine", function="environment.machine", deadline=60, te=True),
    Part(
        stage="a",
        name="memcpy",
        function="environment.memcpy",
        deadline=60,
        settings={"gib": 4.0, "repeats": 20},
        dry={"gib": 0.05, "repeats": 2},
    ),
    *(_gemm(recipe) for recipe in (None, "tensorwise", "blockwise", "mxfp8")),
    *(_parity(name) for name in ("float32", "bf16", "tensorwise", "blockwise")),
    *(_slice(name) for name in ("bf16", "tensorwise", "blockwise")),
    *(_push(mode) for mode in ("tensor", "distributed")),
    Part(
        stage="e",
        name="quickstart",
        function="quickstart.measure",
        deadline=480,
        settings={"dtype": "bfloat16", "sft_steps": 120, "steps": 100, "prompts": 32, "eval_prompts": 500}
        | {"samples": 8000, "held_out": 500, "reward": "configs/rewards/digits.yaml"},
        dry={"sft_steps": 3, "steps": 2, "prompts": 4, "eval_prompts": 8, "samples": 200, "held_out": 20}
        | {"reward": "tools/bench/card/dry_reward.yaml"},
        te=True,
    ),
]
