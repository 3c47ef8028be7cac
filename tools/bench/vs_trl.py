"""One GSPO step here against one in TRL's GRPOTrainer, taking turns in one process.

    python tools/bench/vs_trl.py --model data/tiny-model

Both sides start from the same folder and do the same work in a step: prompts with a 64x64 image, G answers each
of exactly --tokens tokens (the stop token is switched off), the same made-up reward, sequence-level loss, one
AdamW update, float32. Ours includes the shards, the packing and the weight sync to its separate rollout engine;
TRL samples from the very module it trains. Steps alternate, so that a busy machine slows both; the first
--warmup steps of each are not counted. All prompts ask for a single digit and so are equally long: with
prompts of different lengths TRL 1.16 on transformers 5.23 failed here in get_rope_index (98 positions for 95 tokens), it
seems because mm_token_type_ids are padded on the other side than the ids. TRL also computes the router's auxiliary loss.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer


def main(
    model: Annotated[Path, typer.Option(help="Hugging Face folder")] = Path("data/tiny-model"),
    prompts: Annotated[int, typer.Option(help="prompts per step")] = 4,
    group_size: Annotated[int, typer.Option(help="answers per prompt")] = 8,
    tokens: Annotated[int, typer.Option(help="tokens per answer")] = 64,
    steps: Annotated[int, typer.Option(help="counted steps of each side")] = 15,
    warmup: Annotated[int, typer.Option(help="steps not counted")] = 3,
) -> None:
    """Print median seconds per step of both sides, their ratio, and where our time goes, as JSON."""
    if not (model / "config.json").is_file():
        raise typer.BadParameter(
            f"{model} is no Hugging Face folder: python tools/make_tiny_model.py {model}"
        )
    folder = tempfile.mkdtemp()
    make_shards = [sys.executable, str(Path(__file__).parents[1] / "make_shards.py"), "digits", folder]
    subprocess.run([*make_shards, "--tasks", "digit", "--train", "500"], check=True, capture_output=True)
    ours = OurStep(model, f"{folder}/train-*.tar", prompts=prompts, group_size=group_size, tokens=tokens)
    theirs = trl_trainer(model, ours.sample_rows(64), prompts=prompts, group_size=group_size, tokens=tokens)
    times: dict[str, list[float]] = defaultdict(list)
    phases: dict[str, list[float]] = defaultdict(list)
    theirs.add_callback(_alternate(ours, times, phases))
    theirs.args.max_steps = steps + warmup
    theirs.train()
    counted = {name: values[warmup:] for name, values in times.items()}
    result = {
        "gspo_mm_seconds": round(median(counted["ours"]), 4),
        "trl_seconds": round(median(counted["trl"]), 4),
        "ratio": round(median(counted["ours"]) / median(counted["trl"]), 3),
        "gspo_mm_phases": {name: round(median(values[warmup:]), 4) for name, values in phases.items()},
        "completions": prompts * group_size,
        "tokens_per_completion": tokens,
        "machine": f"{platform.machine()}, {_threads()} threads",
        "versions": _versions(),
    }
    typer.echo(json.dumps(result, indent=1))


class OurStep:
    """The stages of `train.py` in the same order, with a made-up reward in place of the reward file."""

    def __init__(self, model: Path, shards: str, *, prompts: int, group_size: int, tokens: int) -> None:
        from gspo_mm.config import parse_config
        from gspo_mm.runtime.dist import Ranks
        from gspo_mm.runtime.phases import Phases
        from gspo_mm.stages import build_stages

        self.config = parse_config(
            {
                "run": {"name": "bench"},
                "model": {"path": str(model)},
                "data": {"train": [shards]},
                "rollout": {
                    "prompts_per_step": prompts,
                    "group_size": group_size,
                    "sampling": {"max_new_tokens": tokens},
                },
                "reward": {"file": str(Path(__file__).parents[2] / "configs/rewards/digits.yaml")},
                "policy": {"dtype": "float32", "optimizer": {"lr": 1e-5}},
                "train": {"updates_per_batch": 1},
            }
        )
        self.stages = build_stages(self.config, Ranks(), total_steps=1000)
        self.stages.processor.stop_token_ids = ()  # every answer runs to its full length
        self.phases = Phases()
        self.step = 0

    def __call__(self) -> dict[str, float]:
        from gspo_mm.advantage import group_advantages
        from gspo_mm.batch import sequences_of
        from gspo_mm.policy.shares import share_out
        from gspo_mm.policy.update import update_policy
        from gspo_mm.rollout.engine import sample_groups
        from gspo_mm.types import Score

        stages, rollout = self.stages, self.config.rollout
        assert stages.engine is not None
        self.phases.take()
        with self.phases("sync"):
            stages.weights.push(version=self.step)
        with self.phases("rollout"):
            groups = sample_groups(
                stages.engine,
                stages.source.take(rollout.prompts_per_step),
                group_size=rollout.group_size,
                sampling=stages.sampling,
                seed=self.step,
                first_id=0,
            )
        scored = [
            replace(g, scores=tuple(Score(value=made_up_reward(c.text), parts={}) for c in g.completions))
            for g in groups
        ]
        result = group_advantages(scored, self.config.advantage)
        assert result.dead == 0, "a dead group would make our step cheaper than TRL's"
        shares, *_ = share_out(
            stages.policy,
            [sequences_of(result.live)],
            processor=stages.processor,
            config=self.config.policy,
        )
        update_policy(
            stages.policy,
            shares,
            processor=stages.processor,
            reference=None,
            config=self.config,
            phases=self.phases,
        )
        self.step += 1
        return self.phases.take()

    def sample_rows(self, count: int) -> list[dict[str, Any]]:
        """The first prompts of the shards as rows of TRL's conversational data set."""
        import io

        from PIL import Image

        from gspo_mm.data.source import PromptSource

        source = PromptSource(self.config.data, self.stages.processor, seed=0, split="train")
        rows = []
        for encoded in source.take(count):
            prompt = encoded.prompt
            text = next(p["text"] for m in prompt.messages for p in m["content"] if p["type"] == "text")
            image = Image.open(io.BytesIO(prompt.images[0].data)).convert("RGB")
            rows.append({"prompt": [{"role": "user", "content": text}], "image": image})
        return rows


def made_up_reward(text: str) -> float:
    """A number in [0, 1) that looks random and depends on the answer alone: no group is dead."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) / 2**32


def trl_trainer(
    model: Path, rows: list[dict[str, Any]], *, prompts: int, group_size: int, tokens: int
) -> Any:
    """A GRPOTrainer set up for GSPO as TRL's documentation does: sequence-level ratios, the paper's mean."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from trl import GRPOConfig, GRPOTrainer

    processor = AutoProcessor.from_pretrained(model)
    # a random model samples image tokens too, and transformers then looks for images that are not there
    visual = [processor.tokenizer.convert_tokens_to_ids(t) for t in ("<|image_pad|>", "<|video_pad|>")]
    arguments = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=prompts * group_size,
        num_generations=group_size,
        max_completion_length=tokens,
        importance_sampling_level="sequence",
        loss_type="grpo",
        epsilon=3e-4,
        epsilon_high=4e-4,
        beta=0.0,
        learning_rate=1e-5,
        generation_kwargs={"min_new_tokens": tokens, "suppress_tokens": visual},
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        max_steps=1,
    )
    return GRPOTrainer(
        model=AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32),
        processing_class=processor,
        reward_funcs=lambda completions, **_: [made_up_reward(c[0]["content"]) for c in completions],
        args=arguments,
        train_dataset=Dataset.from_list(rows),
    )


def _alternate(ours: OurStep, times: dict[str, list[float]], phases: dict[str, list[float]]) -> Any:
    """A callback that times TRL's step and takes one of ours after it."""
    from transformers import TrainerCallback

    class Alternate(TrainerCallback):
        began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times["trl"].append(time.perf_counter() - self.began)
            began = time.perf_counter()
            for name, seconds in ours().items():
                phases[name].append(seconds)
            times["ours"].append(time.perf_counter() - began)

    return Alternate()


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "trl", "megatron-core")}


if __name__ == "__main__":
    typer.run(main)
