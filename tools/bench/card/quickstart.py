"""Stage e: the digits quick start, shards to accuracy, with the policy and the embedded engine on the card."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tools.bench.card.results import Report

ROOT = Path(__file__).parents[3]
# widths that Transformer Engine's kernels take
_WIDTHS = ("text.hidden_size=256", "text.head_dim=64", "text.moe_intermediate_size=384")


def measure(
    report: Report,
    dtype: str,
    sft_steps: int,
    steps: int,
    prompts: int,
    eval_prompts: int,
    samples: int,
    held_out: int,
    reward: str,
) -> None:
    """Warm start and GSPO by the configs of `make quickstart`, with these settings over theirs."""
    from gspo_mm.config import load_config
    from gspo_mm.runtime.preempt import StopRequest
    from gspo_mm.sft import sft
    from gspo_mm.train import train

    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        _tool("make_shards.py", "digits", folder / "digits", "--train", samples, "--validation", held_out)
        _tool(
            "make_tiny_model.py", folder / "model", *(part for width in _WIDTHS for part in ("--set", width))
        )
        common = [
            f"run.dir={folder}/runs",
            f"data.train=[{folder}/digits/train-*.tar]",
            f"data.validation=[{folder}/digits/validation-*.tar]",
            f"reward.file={ROOT / reward}",
            f"policy.dtype={dtype}",
            f"train.eval_prompts={eval_prompts}",
            "checkpoint.every=0",
            "observe.report=false",
        ]
        warm = load_config(
            ROOT / "configs/quickstart_sft.yaml",
            [*common, "run.name=sft", f"model.path={folder}/model", f"sft.steps={sft_steps}"],
        )
        summary = sft(warm, StopRequest())
        report(sft_s=summary["seconds"], accuracy_before=summary["accuracy_after"])
        config = load_config(
            ROOT / "configs/quickstart.yaml",
            [
                *common,
                "run.name=gspo",
                f"model.path={warm.run.path}/hf",
                f"train.steps={steps}",
                f"train.eval_every={steps}",
                f"rollout.prompts_per_step={prompts}",
            ],
        )
        summary = train(config, StopRequest())
        report(seconds_per_step=summary["seconds_per_step_median"], accuracy_after=summary["accuracy_after"])
        report(reward_first=summary["reward_first"], reward_last=summary["reward_last"])
        report(logprob_gap_max=summary["max_abs_logprob_gap"])


def _tool(name: str, *arguments: str | Path | int) -> None:
    subprocess.run([sys.executable, str(ROOT / "tools" / name), *map(str, arguments)], check=True)
